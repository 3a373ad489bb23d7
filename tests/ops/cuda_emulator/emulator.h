// A GPU's block on the CPU, for the tests: what device.cuh has, so that the kernels' source runs unchanged.
//
// Each thread is a fiber. Where the threads of a warp or of the block meet, each waits for the others; whose turn it is
// then, is drawn. What the hardware leaves open is made to show:
// - shared memory begins as NaN;
// - a copy to shared memory leaves NaN when it begins, and comes at once or only when it is waited for, as drawn;
// - reads and writes outside of what was given, and those that are not aligned, are errors;
// - so are copies that nobody waits for;
// - so are accesses of two warps to the same word of shared memory without a barrier between them, one being a write;
// - so are threads of a warp that meet in different instructions, or wait for ever.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>

#define DEV inline
#define BOTH inline
#define KERNEL(name) static void name

using std::max;
using std::min;

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static struct { int x; } threadIdx, blockIdx;

namespace emulator {

constexpr int STACK = 1 << 18, PENDING = 256;
constexpr uint32_t BASE = 1152;   // where shared memory begins: not at zero, so that a forgotten base shows

struct Range { const char *begin, *end; int writable; };
struct Copy { uint32_t to, bytes; const void* from; };
struct Meeting {
  int arrived = 0;
  unsigned held = 0;
  const char* what = nullptr;
  uint32_t given[2][32][12], taken[2][32][4];   // those who are early give while others still take
};
struct Word { unsigned write_epoch, read_epoch; uint8_t writer, readers; };

static uint64_t state;
static uint32_t draw() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state >> 24;
}

static struct {
  alignas(128) char shared[SHARED_BYTES];
  Word words[SHARED_BYTES / 4 + 1];
  jmp_buf scheduler, fibers[THREADS];
  ucontext_t contexts[THREADS], start;
  bool started[THREADS], done[THREADS];
  unsigned epoch[THREADS];
  Copy pending[THREADS][PENDING];
  int pending_count[THREADS];
  Meeting warps[WARPS], block;
  int ready[WARPS][32], ready_count[WARPS], order[WARPS];
  bool in_order;
  const Range* ranges;
  int range_count;
  char message[400];
  char* stacks;
  void (*body)();
} now;

static void make_ready(int thread) { now.ready[thread >> 5][now.ready_count[thread >> 5]++] = thread; }
static void leave() {
  if (!_setjmp(now.fibers[threadIdx.x])) _longjmp(now.scheduler, 1);
}
template <typename... Args>
static void fail(const char* format, Args... args) {
  int used = snprintf(now.message, sizeof now.message, "block %d, thread %d: ", blockIdx.x, threadIdx.x);
  snprintf(now.message + used, sizeof now.message - used, format, args...);
  _longjmp(now.scheduler, 2);
}
static void fiber() {
  now.body();
  if (now.pending_count[threadIdx.x]) fail("ends before its copies, which it has not waited for");
  now.done[threadIdx.x] = true;
  _longjmp(now.scheduler, 1);
}

// Waits until all of a warp are here. The last to come computes what they take.
template <typename Last>
static void meet(const char* what, Last last) {
  const int warp = threadIdx.x >> 5;
  Meeting& meeting = now.warps[warp];
  if (meeting.arrived && meeting.what != what) fail("is at %s, where its warp is at %s", what, meeting.what);
  meeting.what = what;
  if (++meeting.arrived == 32) {
    last(meeting.given[meeting.held & 1], meeting.taken[meeting.held & 1]);
    meeting.arrived = 0;
    ++meeting.held;
    for (int i = 0; i < 32; ++i) make_ready(warp * 32 + i);
  }
  leave();
}
// Gives words and takes others.
template <int GIVEN, int TAKEN, typename Last>
static void trade(const char* what, const uint32_t (&give)[GIVEN], uint32_t (&take)[TAKEN], Last last) {
  const int lane = threadIdx.x & 31;
  Meeting& meeting = now.warps[threadIdx.x >> 5];
  const unsigned turn = meeting.held & 1;
  memcpy(meeting.given[turn][lane], give, sizeof give);
  meet(what, last);
  memcpy(take, meeting.taken[turn][lane], sizeof take);
}

static void note_write(uint32_t offset, int bytes) {
  const unsigned epoch = now.epoch[threadIdx.x];
  const int warp = threadIdx.x >> 5;
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
    Word& word = now.words[i];
    if ((word.write_epoch == epoch && word.writer != warp) || (word.read_epoch == epoch && (word.readers & ~(1 << warp))))
      fail("writes shared memory at %u, which another warp uses before the next barrier", offset);
    word.write_epoch = epoch, word.writer = warp;
  }
}
static void note_read(uint32_t offset, int bytes) {
  const unsigned epoch = now.epoch[threadIdx.x];
  const int warp = threadIdx.x >> 5;
  for (uint32_t i = offset / 4; i < (offset + bytes) / 4; ++i) {
    Word& word = now.words[i];
    if (word.write_epoch == epoch && word.writer != warp)
      fail("reads shared memory at %u, which another warp has written since the last barrier", offset);
    if (word.read_epoch != epoch) word.read_epoch = epoch, word.readers = 0;
    word.readers |= 1 << warp;
  }
}
static char* shared_at(uint32_t at, int bytes) {
  if (at < BASE || at - BASE + bytes > SHARED_BYTES || at % bytes)
    fail("accesses %d bytes of shared memory at %d of %d", bytes, int(at) - int(BASE), SHARED_BYTES);
  return now.shared + (at - BASE);
}
template <typename T>
static T read_shared(uint32_t at) {
  T x;
  memcpy(&x, shared_at(at, sizeof(T)), sizeof(T));
  note_read(at - BASE, sizeof(T));
  return x;
}
template <typename T>
static void write_shared(uint32_t at, T x) {
  memcpy(shared_at(at, sizeof(T)), &x, sizeof(T));
  note_write(at - BASE, sizeof(T));
}
static void check_global(const void* at, int bytes, bool write) {
  const char* begin = static_cast<const char*>(at);
  if (uintptr_t(begin) % bytes) fail("accesses %d bytes of global memory that are not aligned", bytes);
  for (int i = 0; i < now.range_count; ++i)
    if (begin >= now.ranges[i].begin && begin + bytes <= now.ranges[i].end && (!write || now.ranges[i].writable)) return;
  fail("%s %d bytes of global memory that it was not given", write ? "writes" : "reads", bytes);
}

static void finish(const Copy& copy) {
  char* to = shared_at(copy.to, copy.bytes);
  if (copy.from)
    memcpy(to, copy.from, copy.bytes);
  else
    memset(to, 0, copy.bytes);
  note_write(copy.to - BASE, copy.bytes);
}
static void copy(uint32_t to, const void* from, bool there, int bytes) {
  if (there) check_global(from, bytes, false);
  const Copy copy = {to, uint32_t(bytes), there ? from : nullptr};
  memset(shared_at(to, bytes), 0xff, bytes);
  note_write(to - BASE, bytes);
  if (draw() & 1) return finish(copy);
  int& count = now.pending_count[threadIdx.x];
  if (count == PENDING) fail("has more than %d copies in flight", PENDING);
  now.pending[threadIdx.x][count++] = copy;
}

static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
#if BF16
static float widen(uint32_t half) { return float_of(half << 16); }
static uint32_t narrow(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
static float widen(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));   // subnormal numbers too
}
static uint32_t narrow(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const float size = fabsf(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint32_t(nearbyintf(size * 0x1p24f));
  const uint32_t bits = bits_of(size);
  return sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
}
#endif
static float half_of(uint32_t pair, int upper) { return widen(pair >> 16 * upper & 0xffff); }

// Runs blocks in an order that is drawn. Returns 0, or 1 with a message.
static int run(int blocks, uint64_t seed, const Range* ranges, int range_count, char* message, int size, void (*body)()) {
  state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  for (int i = 0; i < 8; ++i) draw();
  now.ranges = ranges, now.range_count = range_count, now.body = body;
  if (!now.stacks) now.stacks = static_cast<char*>(malloc(size_t(THREADS) * STACK));
  int* const order = static_cast<int*>(malloc(blocks * sizeof(int)));
  for (int i = 0; i < blocks; ++i) {
    const int j = draw() % (i + 1);
    order[i] = order[j], order[j] = i;
  }
  volatile int failed = 0;
  for (volatile int turn = 0; turn < blocks && !failed; ++turn) {
    blockIdx.x = order[turn];
    memset(now.shared, 0xff, sizeof now.shared);
    memset(now.words, 0xff, sizeof now.words);
    now.block.arrived = 0;
    now.in_order = draw() & 1;
    for (int i = 0; i < WARPS; ++i) {
      const int j = draw() % (i + 1);
      now.order[i] = now.order[j], now.order[j] = i;
      now.warps[i].arrived = now.ready_count[i] = 0;
    }
    for (int i = 0; i < THREADS; ++i) {
      now.started[i] = now.done[i] = false;
      now.epoch[i] = now.pending_count[i] = 0;
      make_ready(i);
    }
    const int how = _setjmp(now.scheduler);
    if (how == 2) {
      failed = 1;
      break;
    }
    // The first warp in the order that can go on, or any; and any of its threads.
    int any[WARPS], count = 0;
    for (int i = 0; i < WARPS; ++i)
      if (now.ready_count[now.order[i]]) any[count++] = now.order[i];
    if (!count) {
      for (int i = 0; i < THREADS && !failed; ++i)
        if (!now.done[i]) {
          failed = 1;
          snprintf(now.message, sizeof now.message, "block %d, thread %d: waits for ever", blockIdx.x, i);
        }
      continue;
    }
    const int warp = now.in_order ? any[0] : any[draw() % count];
    const int place = draw() % now.ready_count[warp], thread = now.ready[warp][place];
    now.ready[warp][place] = now.ready[warp][--now.ready_count[warp]];
    threadIdx.x = thread;
    if (now.started[thread]) _longjmp(now.fibers[thread], 1);
    now.started[thread] = true;
    ucontext_t& context = now.contexts[thread];
    getcontext(&context);
    context.uc_stack.ss_sp = now.stacks + size_t(thread) * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    setcontext(&context);
  }
  free(order);
  if (failed) snprintf(message, size, "%s", now.message);
  return failed;
}

}  // namespace emulator

DEV uint32_t shared_base() { return emulator::BASE; }
DEV uint4 load_shared4(uint32_t at) { return emulator::read_shared<uint4>(at); }
DEV uint2 load_shared2(uint32_t at) { return emulator::read_shared<uint2>(at); }
DEV uint32_t load_shared1(uint32_t at) { return emulator::read_shared<uint32_t>(at); }
DEV void store_shared1(uint32_t at, uint32_t x) { emulator::write_shared(at, x); }
DEV void store_shared2(uint32_t at, uint2 x) { emulator::write_shared(at, x); }

template <int COUNT>
static void load_matrices(const char* what, uint32_t (&x)[4], uint32_t at) {
  const int lane = threadIdx.x & 31;
  if (lane < 8 * COUNT) {
    emulator::shared_at(at, 16);
    emulator::note_read(at - emulator::BASE, 16);
  }
  emulator::trade(what, {at}, x, [](const uint32_t(*given)[12], uint32_t(*taken)[4]) {
    for (int i = 0; i < COUNT; ++i) {
      uint16_t rows[8][8];
      for (int r = 0; r < 8; ++r) memcpy(rows[r], emulator::now.shared + given[8 * i + r][0] - emulator::BASE, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane >> 2, t = lane & 3;
        taken[lane][i] = rows[2 * t][g] | uint32_t(rows[2 * t + 1][g]) << 16;
      }
    }
  });
}
DEV void load_matrices4(uint32_t (&x)[4], uint32_t at) { load_matrices<4>("load_matrices4", x, at); }
DEV void load_matrices2(uint32_t (&x)[4], uint32_t at) { load_matrices<2>("load_matrices2", x, at); }

DEV void copy16(uint32_t to, const void* from, bool there) { emulator::copy(to, from, there, 16); }
DEV void copy4(uint32_t to, const void* from, bool there) { emulator::copy(to, from, there, 4); }
DEV void wait_for_copies() {
  for (int i = 0; i < emulator::now.pending_count[threadIdx.x]; ++i) emulator::finish(emulator::now.pending[threadIdx.x][i]);
  emulator::now.pending_count[threadIdx.x] = 0;
}

template <typename T>
DEV T load_global(const void* from) {
  emulator::check_global(from, sizeof(T), false);
  T x;
  memcpy(&x, from, sizeof(T));
  return x;
}
template <typename T>
DEV void store_global(void* to, T x) {
  emulator::check_global(to, sizeof(T), true);
  memcpy(to, &x, sizeof(T));
}

DEV void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  using namespace emulator;
  const uint32_t give[10] = {a0, a1, a2, a3, b0, b1, bits_of(d[0]), bits_of(d[1]), bits_of(d[2]), bits_of(d[3])};
  uint32_t take[4];
  trade("multiply", give, take, [](const uint32_t(*given)[12], uint32_t(*taken)[4]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2, t = lane & 3;
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + e] = half_of(given[lane][i], e);
        for (int i = 0; i < 2; ++i) b[2 * t + 8 * i + e][g] = half_of(given[lane][4 + i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int m = (lane >> 2) + 8 * (i >> 1), n = 2 * (lane & 3) + (i & 1);
        float sum = float_of(given[lane][6 + i]);
        for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
        taken[lane][i] = bits_of(sum);
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = float_of(take[i]);
}
DEV uint32_t transpose(uint32_t x) {
  uint32_t take[1];
  emulator::trade("transpose", {x}, take, [](const uint32_t(*given)[12], uint32_t(*taken)[4]) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < 32; ++lane) memcpy(&rows[lane >> 2][2 * (lane & 3)], given[lane], 4);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2, t = lane & 3;
      taken[lane][0] = rows[2 * t][g] | uint32_t(rows[2 * t + 1][g]) << 16;
    }
  });
  return take[0];
}
DEV uint32_t pack(float low, float high) { return emulator::narrow(low) | emulator::narrow(high) << 16; }

DEV float anything() { return NAN; }
DEV float exp2_of(float x) { return exp2f(x); }
DEV float log2_of(float x) { return log2f(x); }
DEV float reciprocal(float x) { return 1 / x; }
DEV float as_float(uint32_t x) { return emulator::float_of(x); }
DEV uint32_t as_bits(float x) { return emulator::bits_of(x); }
DEV uint32_t whole(uint32_t x) { return x; }

DEV float exchange(float x, int lanes) {
  uint32_t take[1];
  const auto swap = [](int mask) {
    return [mask](const uint32_t(*given)[12], uint32_t(*taken)[4]) {
      for (int lane = 0; lane < 32; ++lane) taken[lane][0] = given[lane ^ mask][0];
    };
  };
  emulator::trade("exchange", {as_bits(x)}, take, swap(lanes));
  return as_float(take[0]);
}
DEV void meet_warp() {
  emulator::meet("meet_warp", [](const uint32_t(*)[12], uint32_t(*)[4]) {});
}
DEV void meet_block() {
  using namespace emulator;
  ++now.epoch[threadIdx.x];
  if (++now.block.arrived == THREADS) {
    now.block.arrived = 0;
    for (int i = 0; i < THREADS; ++i) make_ready(i);
  }
  leave();
}
