// How threads share the work of one call, whoever the threads are: torch's or onnxruntime's.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>

#include "problem.h"

namespace sasa {

// Memory that begins with a cache line: a vector in two lines takes two loads.
class Memory {
 public:
  explicit Memory(int64_t bytes) : whole_(new char[bytes + LINE]) {}
  void* data() const { return whole_.get() + (LINE - reinterpret_cast<uintptr_t>(whole_.get()) % LINE) % LINE; }

 private:
  static constexpr int64_t LINE = 64;
  std::unique_ptr<char[]> whole_;
};

// Scratch memory of one thread, as the kernels want it: zeros at first.
inline Memory zeros(int64_t bytes) {
  Memory memory(bytes);
  std::memset(memory.data(), 0, bytes);
  return memory;
}

// Cut each phase into bands, compute them on some threads, and let the result not depend on the cuts.
//
// There are enough bands to keep every thread busy, but of at least min_blocks blocks. Neighbouring bands pack
// a radius of the same rows, and in the backward recompute them.
// A task is a band of each phase of one partial: their order is fixed, as they add to the same sums. Without
// tables every phase is a task of its own.
// share(tasks, range) calls range(first, end) with parts of the tasks, from any threads. `threads` is about how
// many. Each call of range has scratch memory of its own, of `scratch` bytes.
template <typename Share, typename Run>
void run_bands(const Problem& p, int64_t min_blocks, int64_t scratch, int64_t threads, const Share& share,
               const Run& run) {
  const int64_t phase_cols = phases(p, p.width), all_phases = phases(p, p.height) * phase_cols;
  const int64_t partials = p.dtables ? table_partials(p) : all_phases;
  const int64_t uncut_tasks = p.batch * p.heads * partials;
  if (uncut_tasks == 0) return;
  const int64_t wanted = (4 * threads + uncut_tasks - 1) / uncut_tasks;
  const int64_t cuts = std::max<int64_t>(1, std::min(wanted, blocks(p) / min_blocks));  // bands of a phase
  share(uncut_tasks * cuts, [&](int64_t first_task, int64_t end_task) {
    const Memory memory = zeros(scratch);
    for (int64_t task = first_task; task < end_task; ++task) {
      const int64_t image_head = task / cuts / partials, partial = task / cuts % partials, cut = task % cuts;
      const int64_t image = image_head / p.heads, head = image_head % p.heads;
      const int64_t first = blocks(p) * cut / cuts * BLOCK_ROWS;
      const int64_t last = blocks(p) * (cut + 1) / cuts * BLOCK_ROWS;
      const int64_t end_phase = all_phases * (partial + 1) / partials;
      for (int64_t phase = all_phases * partial / partials; phase < end_phase; ++phase) {
        const int64_t row = phase / phase_cols, height = size_at_phase(p, p.height, row);
        const Band band{image, head, row, phase % phase_cols, first, std::min(last, height), partial};
        if (band.first < band.last) run(p, band, memory.data());
      }
    }
  });
}

}  // namespace sasa
