// What one call asks of the kernels, in plain pointers and numbers. README.md says how they work.
//
// The kernels are compiled once for each CPU capability. They may not instantiate a template that another file
// instantiates too: the linker keeps one copy, perhaps one with instructions that this CPU lacks.
#pragma once
#include <cstdint>

namespace sasa {

enum class Type : int { Float, Double, BFloat16, Half };

// Edge of the largest window, and the largest stride: buffers on the stack are made for them.
constexpr int64_t LARGEST_KERNEL = 127;
constexpr int64_t LARGEST_STRIDE = 8;

// Rows of a block: the gradients of the relative tables are summed over one block at a time. Bands begin at
// blocks, so that these sums do not depend on how a map is cut into bands.
constexpr int64_t BLOCK_ROWS = 16;

// A (B, heads * depth, H, W) tensor of any strides, which are in elements.
struct Map {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, col = 0;
};

struct Problem {
  int64_t batch, heads, depth;
  int64_t height, width;          // of the queries
  int64_t kv_height, kv_width;    // of the keys and values, of which only every kv_step-th row and column counts
  int64_t kv_step;
  // Of those that count, pixels from one query to the next, and from one neighbour to the next. They have no common
  // divisor.
  int64_t stride, dilation;
  int64_t kernel_size;
  bool mask;  // border 'mask', else 'zeros'
  double scale;
  Type type;
  Map query, key, value;           // without key.data the logits are the relative bias alone
  const void* rel_row = nullptr;   // (heads or 1, depth / 2, k) in the compute type, or null
  const void* rel_col = nullptr;
  int64_t rel_head = 0;            // elements from one head's table to the next; 0 where all heads share one
  // (B, heads, H, W) in the compute type: log-sum-exp of S, in units of log 2. Null if no backward follows.
  void* lse = nullptr;

  Map output;  // forward only

  // Backward only.
  Map doutput, dquery, dkey, dvalue;
  // (B, heads, table_partials(), blocks(), 2, depth / 2, k), zeros at first. The sum over the partials and the
  // blocks is the gradient of the tables.
  void* dtables = nullptr;
};

// Rows [first, last) of the queries of one head of one image, at one phase of the dilation.
struct Band {
  int64_t image, head, phase_row, phase_col;
  int64_t first, last;
  int64_t partial;  // that this phase adds to
};

// Static, so that each file has its own copy, compiled for its own CPU capability.

// Say of what size the keys' map is, how far apart queries are, and how far apart neighbours are.
static inline void set_sizes(Problem& p, int64_t height, int64_t width, int64_t stride, int64_t dilation) {
  // With any larger distance there is one query, or a window has its centre alone in the map. An empty map has no
  // edge to take.
  const int64_t edge = height > width ? height : width, most = edge > 1 ? edge : 1;
  p.stride = stride < most ? stride : most;
  p.dilation = dilation < most ? dilation : most;
  p.height = (height + p.stride - 1) / p.stride;
  p.width = (width + p.stride - 1) / p.stride;
  // No window has a pixel between those that are a common divisor apart.
  p.kv_step = p.stride;
  for (int64_t rest = p.dilation; rest > 0;) {
    const int64_t next = p.kv_step % rest;
    p.kv_step = rest, rest = next;
  }
  p.stride /= p.kv_step;
  p.dilation /= p.kv_step;
  p.kv_height = (height + p.kv_step - 1) / p.kv_step;
  p.kv_width = (width + p.kv_step - 1) / p.kv_step;
}

// Whether any row or column of the keys may be in no window. The backward then leaves dK and dV there as they are.
static inline bool leaves_gaps(const Problem& p) {
  return p.kv_step > 1 || (p.stride > 1 && (p.dilation > 1 || p.kernel_size / 2 + 1 < p.stride));
}

// How many of n rows or columns are at a phase.
static inline int64_t size_at_phase(const Problem& p, int64_t n, int64_t phase) {
  return (n - phase + p.dilation - 1) / p.dilation;
}
// How many phases have any of n rows or columns.
static inline int64_t phases(const Problem& p, int64_t n) { return p.dilation < n ? p.dilation : n; }

// Blocks of the first phase, which has the most rows.
static inline int64_t blocks(const Problem& p) {
  return (size_at_phase(p, p.height, 0) + BLOCK_ROWS - 1) / BLOCK_ROWS;
}

// Number of partials. One for each phase, unless they took more memory than a quarter of a map: then several
// phases share one.
static inline int64_t table_partials(const Problem& p) {
  const int64_t all = phases(p, p.height) * phases(p, p.width);
  const int64_t most = all ? p.height * p.width / (4 * p.kernel_size * blocks(p)) : 0;
  return most < 1 ? 1 : most < all ? most : all;
}

// A part of a matrix product's result, from packed panels of B and mostly of A.
struct Tile {
  int64_t rows, columns, depth;
  float* result;
  int64_t stride;  // of the result's rows; a row is dense
  bool add;        // to what the result holds
  // Added, if not null: a number for each row, or for each column.
  const float *row_bias = nullptr, *column_bias = nullptr;
  // 0 if A is packed. Else A's rows are read as they are, so far apart. There must be whole panels of them.
  int64_t a_row = 0;
};

// How matrices of float are multiplied; matmul.h says how it works.
struct Multiplication {
  int64_t panel_rows, panel_columns;
  // Pack `lines` of `depth` numbers, whose strides are in elements, into panels of A's rows or B's columns.
  void (*pack_rows)(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to);
  void (*pack_columns)(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to);
  void (*multiply)(const Tile&, const float* a, const float* b, bool b_outside);
};

struct Kernels {
  const char* capability;
  // Bytes of scratch memory of one thread. It starts as zeros, and goes from band to band as it is.
  int64_t (*scratch)(const Problem&, bool backward);
  void (*forward)(const Problem&, const Band&, void* scratch);
  void (*backward)(const Problem&, const Band&, void* scratch);
  Multiplication multiplication;  // null where there is only inference in onnxruntime
};

const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace sasa
