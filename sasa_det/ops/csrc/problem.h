// What a local attention on the CPU is asked to do, in plain pointers: the kernels are compiled once
// for each CPU capability, and must not instantiate anything that another file may link against.
#pragma once
#include <cstdint>

namespace sasa {

enum class Type : int { Float, Double, BFloat16, Half };

// Edge of the largest window: stack buffers are made for it.
constexpr int64_t LARGEST_KERNEL = 127;

// Rows over which a gradient of the tables is summed before it is added to others. Bands begin at a multiple,
// so that the sums do not depend on how a map is cut.
constexpr int64_t TABLE_ROWS = 16;

// A (B, heads * depth, H, W) map in any layout; strides in elements.
struct Map {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, col = 0;
};

struct Problem {
  int64_t batch, heads, depth, height, width;
  int64_t kernel_size, dilation;
  bool mask;
  double scale;
  Type type;
  Map query, key, value;             // key.data null: logits q.r alone
  const void* rel_row = nullptr;     // (heads or 1, depth / 2, k) in the compute type, or null
  const void* rel_col = nullptr;
  int64_t rel_head = 0;              // from a head's to the next head's, in elements: 0 where they share them
  void* logsumexp = nullptr;         // (B, heads, H, W) in the compute type, in units of log 2

  Map output;  // forward only

  // Backward only.
  Map grad, grad_query, grad_key, grad_value;
  // (B, heads, table_groups(), blocks(), 2, depth / 2, k), zeros at first: partial sums, each over TABLE_ROWS rows
  // of the phases of a group.
  void* table_grads = nullptr;
};

// Rows [first, last) of one head of one image, at one phase of the dilation.
struct Band {
  int64_t image, head, phase_row, phase_col;
  int64_t first, last;
  int64_t group;  // of phases, which add to the same partial sums
};

// Static, so that each file has its own, compiled for its own CPU capability.

// How many of n rows or columns are at a phase, and how many phases have any.
static inline int64_t at_phase(const Problem& p, int64_t n, int64_t phase) {
  return (n - phase + p.dilation - 1) / p.dilation;
}
static inline int64_t phases(const Problem& p, int64_t n) { return p.dilation < n ? p.dilation : n; }

// Blocks of TABLE_ROWS rows at the first phase, which has the most.
static inline int64_t blocks(const Problem& p) {
  return (at_phase(p, p.height, 0) + TABLE_ROWS - 1) / TABLE_ROWS;
}

// Into how many groups the phases fall: as many as there are, unless the partial sums took more than a fourth of a map.
static inline int64_t table_groups(const Problem& p) {
  const int64_t all = phases(p, p.height) * phases(p, p.width);
  const int64_t most = all ? p.height * p.width / (4 * p.kernel_size * blocks(p)) : 0;
  return most < 1 ? 1 : most < all ? most : all;
}

struct Kernels {
  const char* capability;
  // Bytes of scratch that one thread needs, zeros at first and then handed on from band to band.
  int64_t (*scratch)(const Problem&, bool backward);
  void (*forward)(const Problem&, const Band&, void* scratch);
  void (*backward)(const Problem&, const Band&, void* scratch);
};

const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace sasa
