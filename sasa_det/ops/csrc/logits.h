// The logits of a tile: S = Q K^T + bias, masked at the border, and buffers for S, P, dP and dS.
#pragma once
#include "products.h"

namespace sasa {
namespace {

// Rows of K and V in the windows of QUERY_ROWS query rows.
inline int64_t kv_rows(int64_t k) { return k + QUERY_ROWS - 1; }

// The log-sum-exp of row y of a band's phase; its pixels are p.dilation apart.
template <typename T>
inline T* lse_row(const Problem& p, const Band& band, int64_t y) {
  return static_cast<T*>(p.lse) +
         ((band.image * p.heads + band.head) * p.height + band.phase_row + y * p.dilation) * p.width +
         band.phase_col;
}

// The relative tables of one head, or null.
template <typename T>
struct Tables {
  const T* row = nullptr;
  const T* col = nullptr;
};

template <typename T>
inline Tables<T> tables_of(const Problem& p, int64_t head) {
  Tables<T> tables;
  if (p.rel_row) {
    tables.row = static_cast<const T*>(p.rel_row) + head * p.rel_head;
    tables.col = static_cast<const T*>(p.rel_col) + head * p.rel_head;
  }
  return tables;
}

// Border 'mask': set to -infinity the logits of a row of the window that lie left or right of the map.
template <typename T>
inline void mask_sides(const Layout<T>& layout, int64_t x, Vec<T>* logits) {
  typedef typename Vector<T>::type V;
  if (x >= layout.radius && x + Vector<T>::lanes + layout.radius <= layout.width) return;
  V leftmost;
  for (int n = 0; n < Vector<T>::lanes; ++n) leftmost[n] = T(x + n - layout.radius);
  for (int64_t j = 0; j < layout.k; ++j) {
    const V col = leftmost + T(j);
    const auto outside = (col < T(0)) | (col >= T(layout.width));
    logits[j] = outside ? splat<T>(-__builtin_inf()) : logits[j];
  }
}

// Buffers of one tile, for each of its vectors of pixels and each query row. They hold S and later P, or dP and
// later dS.
template <typename T>
struct TileLogits {
  Vec<T>* data;  // [vector][query row][k * k]
  Vec<T>* bias;  // [vector][query row][2 * k]: the terms of the window's rows, then of its columns
  Vec<T>* max;   // [vector][query row]: the largest of data

  TileLogits(Scratch<T>& scratch, int64_t k) {
    constexpr int64_t windows = TILE_VECTORS * QUERY_ROWS * Vector<T>::lanes;
    data = reinterpret_cast<Vec<T>*>(scratch.allocate(windows * k * k));
    bias = reinterpret_cast<Vec<T>*>(scratch.allocate(windows * 2 * k));
    max = reinterpret_cast<Vec<T>*>(scratch.allocate(windows));
  }
  static int64_t elements(int64_t k) {
    return TILE_VECTORS * QUERY_ROWS * Vector<T>::lanes * (k * k + 2 * k + 1);
  }
};

// Rows of K or V as window_sums takes them, with what is in a tile's buffer as their weights.
template <typename T>
inline WeightedRows<T> weighted_rows(const Layout<T>& layout, const TileLogits<T>& tile, const T* const* rows) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t k = layout.k;
  const T* weights = reinterpret_cast<const T*>(tile.data);
  return {rows, k, layout.stride, weights, (k * k - k) * L, k * L, L};
}

// out[r][i][j] = bias[r][i][j] + a[r] . rows[i + r] shifted by j, for the windows of R query rows and a tile.
// Where rows[i + r] is out of the map, out is left as it is.
template <int R, typename T>
inline void window_dots(const Layout<T>& layout, const T* const* a, const T* const* rows,
                        const RowRange& range, int64_t offset, const Vec<T>* bias, Vec<T>* out, Vec<T>* max,
                        int64_t vectors) {
  const int64_t k = layout.k;
  for (int64_t u = range.begin; u < range.end; ++u) {
    // The query rows whose windows have row u.
    const int64_t first = u < k ? 0 : u - k + 1, last = u < R ? u : R - 1;
    const T* next = rows[u + 1 < range.end ? u + 1 : u];
    const Vec<T>* first_bias = bias + first * 2 * k;
    dispatch_rows(last - first + 1, [&](auto count) {
      if constexpr (count.value > R) return;
      // A single query row has registers left. With more sums, fewer of the products wait for the one before.
      constexpr int most = count.value == 1 ? MAX_NEIGHBOURS_OF_ONE_ROW : MAX_NEIGHBOURS;
      by_neighbours<most>(k, [&](auto neighbours, int64_t j) {
        const Bias<T> start{first_bias + u - first, first_bias + k + j, 2 * k};
        neighbour_dots<count.value, neighbours.value>(a + first, rows[u] + offset + j, next + offset,
                                                      layout.depth, layout.stride, start,
                                                      out + first * k * k + (u - first) * k + j, k,
                                                      max ? max + first : nullptr, vectors);
      });
    });
  }
}

// The largest of n vectors, lane by lane, in four chains that do not wait for each other. A NaN is never the
// largest; the sum of the exponentials becomes NaN all the same.
template <typename T>
inline Vec<T> max_of(const Vec<T>* x, int64_t n) {
  Vec<T> max[4];
  for (int m = 0; m < 4; ++m) max[m] = splat<T>(-__builtin_inf());
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) max[m] = max_vec<T>(x[i + m], max[m]);
  for (; i < n; ++i) max[0] = max_vec<T>(x[i], max[0]);
  for (int m = 1; m < 4; ++m) max[0] = max_vec<T>(max[m], max[0]);
  return max[0];
}

// S of the windows of R query rows and a tile, and the largest of each window.
template <int R, typename T>
inline void compute_logits(const Problem& p, const Layout<T>& layout, const Tables<T>& tables, int64_t x0,
                           int64_t vectors, const T* const* q, const T* const* key_rows, const RowRange& range,
                           const TileLogits<T>& logits) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const int64_t k = layout.k, half = layout.depth / 2, area = k * k;
  for (int64_t v = 0; v < vectors; ++v) {
    V* bias = logits.bias + v * QUERY_ROWS * 2 * k;
    if (tables.row)
      by_neighbours(k, [&](auto count, int64_t j) {
        relative_bias<R, count.value>(q, v * L, tables.row + j, half, layout.stride, k, bias + j, 2 * k);
        relative_bias<R, count.value>(q, v * L + half * layout.stride, tables.col + j, half, layout.stride, k,
                                      bias + k + j, 2 * k);
      });
    for (int r = 0; r < R; ++r) logits.max[v * QUERY_ROWS + r] = splat<T>(-__builtin_inf());
  }
  if (p.key.data)
    window_dots<R>(layout, q, key_rows, range, layout.margin + x0 - layout.radius, logits.bias, logits.data,
                   logits.max, vectors);

  // Left are the logits out of the map, or all without K. They are the bias alone, or masked.
  const bool at_sides = p.mask && (x0 < layout.radius || x0 + vectors * L + layout.radius > layout.width);
  const bool inside = p.key.data && range.has(0) && range.has(k + R - 2);
  if (inside && !at_sides) return;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t r = 0; r < R; ++r) {
      V* window = logits.data + (v * QUERY_ROWS + r) * area;
      const V* bias = logits.bias + (v * QUERY_ROWS + r) * 2 * k;
      for (int64_t i = 0; i < k; ++i) {
        const bool outside = !range.has(r + i);
        if (!p.key.data || outside)
          for (int64_t j = 0; j < k; ++j)
            window[i * k + j] = p.mask && outside ? splat<T>(-__builtin_inf()) : bias[i] + bias[k + j];
        if (p.mask) mask_sides(layout, x0 + v * L, window + i * k);
      }
      logits.max[v * QUERY_ROWS + r] = max_of<T>(window, area);
    }
}

}  // namespace
}  // namespace sasa
