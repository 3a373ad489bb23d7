// Matrix products in float: packed panels, and tiles of the result in registers. projection.h says what for.
//
// The design is that of GotoBLAS. A panel of A has PANEL_ROWS rows, a panel of B has PANEL_COLUMNS columns. Both
// are packed such that a loop over the depth reads them front to back. Numbers past the edge are zeros.
#pragma once
#include <cstring>

#include "vectors.h"

namespace sasa {
namespace {

// A tile of the result takes 24 of 32 registers, or 12 of 16. Three hold a row of B's panel, and one a number of
// A's. So a step of the depth does 24 products with 11 loads, or 12 with 7.
constexpr int PANEL_ROWS = VECTOR_REGISTERS == 32 ? 8 : 4;
constexpr int PANEL_VECTORS = 3;
constexpr int PANEL_COLUMNS = PANEL_VECTORS * Vector<float>::lanes;

// Write the transpose of 4 x 4 numbers.
inline void transpose_4x4(const float* from, int64_t stride, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // GCC has the other from version 12 on
  typedef int32_t Lanes __attribute__((vector_size(16)));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Lanes{__VA_ARGS__})
#endif
  const auto row = [&](int64_t n) -> Four { return *reinterpret_cast<const Unaligned*>(from + n * stride); };
  const auto put = [&](int64_t n, Four x) { *reinterpret_cast<Unaligned*>(to + n * to_stride) = x; };
  const Four a = row(0), b = row(1), c = row(2), d = row(3);
  const Four ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
  put(0, SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  put(1, SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  put(2, SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  put(3, SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
}
#undef SHUFFLE

// Pack lines, which are A's rows or B's columns, into panels of WIDTH lines: `depth` times WIDTH numbers each.
template <int WIDTH>
void pack_panels(const float* from, int64_t line, int64_t step, int64_t lines, int64_t depth, float* to) {
  for (; lines > 0; lines -= WIDTH, from += WIDTH * line, to += WIDTH * depth) {
    int64_t k = 0;
    if (lines < WIDTH) {
      for (; k < depth; ++k)
        for (int64_t n = 0; n < WIDTH; ++n) to[k * WIDTH + n] = n < lines ? from[n * line + k * step] : 0.0f;
      continue;
    }
    if (line == 1) {
      for (; k < depth; ++k) std::memcpy(to + k * WIDTH, from + k * step, WIDTH * sizeof(float));
    } else if (step == 1) {
      for (; k + 4 <= depth; k += 4)
        for (int n = 0; n < WIDTH; n += 4) transpose_4x4(from + n * line + k, line, to + k * WIDTH + n, WIDTH);
    }
    for (; k < depth; ++k)
      for (int64_t n = 0; n < WIDTH; ++n) to[k * WIDTH + n] = from[n * line + k * step];
  }
}

// Compute one tile from a panel of each, and store or add what lies in the result. Where A is not PACKED, `a` is
// its first row, of which the numbers are side by side, and t.a_row leads to the next row. Only VECTORS vectors of
// B's panel are computed.
template <bool PACKED, int VECTORS>
void multiply_tile(const Tile& t, const float* a, const float* b) {
  constexpr int lanes = Vector<float>::lanes, COLUMNS = VECTORS * lanes;
  Vec<float> sums[PANEL_ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = Vec<float>{};
  const int64_t row = PACKED ? 1 : t.a_row;
  for (int64_t k = 0; k < t.depth; ++k, a += PACKED ? PANEL_ROWS : 1, b += PANEL_COLUMNS) {
    Vec<float> right[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) right[v] = load_once(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < PANEL_ROWS; ++i) {
      const Vec<float> left = opaque<float>(splat(a[i * row]));
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sums[i][v] += left * right[v];
    }
  }
  if (t.rows >= PANEL_ROWS && t.columns >= COLUMNS) {
#pragma GCC unroll 8
    for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) {
        float* at = t.result + i * t.stride + v * lanes;
        Vec<float> x = sums[i][v];
        if (t.add) x += load(at);
        if (t.row_bias) x += t.row_bias[i];
        if (t.column_bias) x += load(t.column_bias + v * lanes);
        store(at, x);
      }
    return;
  }
  float whole[PANEL_ROWS * COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < PANEL_ROWS; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) store(whole + i * COLUMNS + v * lanes, sums[i][v]);
  const int64_t rows = t.rows < PANEL_ROWS ? t.rows : PANEL_ROWS;
  const int64_t columns = t.columns < COLUMNS ? t.columns : COLUMNS;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float* at = t.result + i * t.stride + j;
      float x = whole[i * COLUMNS + j];
      if (t.add) x += *at;
      if (t.row_bias) x += t.row_bias[i];
      if (t.column_bias) x += t.column_bias[j];
      *at = x;
    }
}

template <bool PACKED>
void multiply_columns(const Tile& t, const float* a, const float* b) {
  constexpr int lanes = Vector<float>::lanes;
  if (t.columns > 2 * lanes) multiply_tile<PACKED, 3>(t, a, b);
  else if (t.columns > lanes) multiply_tile<PACKED, 2>(t, a, b);
  else multiply_tile<PACKED, 1>(t, a, b);
}

// Multiply panels that cover a block of the result. The panels of B stay in the first-level cache if
// `b_outside`, else those of A.
inline void multiply_panels(const Tile& block, const float* a, const float* b, bool b_outside) {
  const auto tile = [&](int64_t i, int64_t j) {
    Tile t = block;
    t.rows -= i;
    t.columns -= j;
    t.result += i * block.stride + j;
    if (t.row_bias) t.row_bias += i;
    if (t.column_bias) t.column_bias += j;
    const float* right = b + j * block.depth;
    if (block.a_row) multiply_columns<false>(t, a + i * block.a_row, right);
    else multiply_columns<true>(t, a + i * block.depth, right);
  };
  if (b_outside) {
    for (int64_t j = 0; j < block.columns; j += PANEL_COLUMNS)
      for (int64_t i = 0; i < block.rows; i += PANEL_ROWS) tile(i, j);
  } else {
    for (int64_t i = 0; i < block.rows; i += PANEL_ROWS)
      for (int64_t j = 0; j < block.columns; j += PANEL_COLUMNS) tile(i, j);
  }
}

}  // namespace
}  // namespace sasa
