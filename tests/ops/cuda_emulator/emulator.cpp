// One kernel under the emulator, as a library. KERNEL_FILE and KERNEL_NAME say which.
#define EMULATED
#include KERNEL_FILE

static const Arguments* arguments;

extern "C" int run(const Arguments* given, int blocks, unsigned long long seed, const emulator::Range* ranges, int range_count,
                   char* message, int size) {
  arguments = given;
  return emulator::run(blocks, seed, ranges, range_count, message, size, [] { KERNEL_NAME(*arguments); });
}
