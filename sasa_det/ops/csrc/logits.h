// The logits of a tile: S = Q K^T + bias, masked at the border, and buffers for S, P, dP and dS.
#pragma once
#include "products.h"

namespace sasa {
namespace {

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

// The columns' is copied into the order of the neighbours.
template <typename T>
inline Tables<T> tables_of(const Problem& p, int64_t head, const Neighbours& neighbours, Scratch<T>& scratch) {
  Tables<T> tables;
  if (p.rel_row) {
    tables.row = static_cast<const T*>(p.rel_row) + head * p.rel_head;
    const int64_t half = p.depth / 2, k = p.kernel_size;
    const T* from = static_cast<const T*>(p.rel_col) + head * p.rel_head;
    T* to = scratch.allocate(half * k);
    for (int64_t c = 0; c < half; ++c)
      for (int64_t n = 0; n < k; ++n) to[c * k + n] = from[c * k + neighbours.order[n]];
    tables.col = to;
  }
  return tables;
}

// Border 'mask': set to -infinity the logits of a row of the window that lie left or right of the map.
template <typename T>
inline void mask_sides(const Layout<T>& layout, const Neighbours& neighbours, int64_t x, Vec<T>* logits) {
  typedef typename Vector<T>::type V;
  if (layout.are_inside(x, Vector<T>::lanes)) return;
  V leftmost;
  for (int n = 0; n < Vector<T>::lanes; ++n) leftmost[n] = T(layout.window_left(x + n));
  for (int64_t n = 0; n < layout.k; ++n) {
    const V col = leftmost + T(neighbours.order[n]);
    const auto outside = (col < T(0)) | (col >= T(layout.keys.width));
    logits[n] = outside ? splat<T>(-__builtin_inf()) : logits[n];
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
inline KvRows<T> weighted_rows(const Layout<T>& layout, const Neighbours& neighbours, const TileLogits<T>& tile,
                               const T* const* rows) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t k = layout.k;
  const T* weights = reinterpret_cast<const T*>(tile.data);
  return {{rows, k, layout.stride, weights, (k * k - layout.kv_stride * k) * L, k * L, L},
          layout.kv_stride,
          neighbours};
}

// out[r][i][n] = bias[r][i][n] + a[r] . rows[i + r * kv_stride] at neighbour n, for the windows of R query rows and a
// tile. Where that row is out of the map, out is left as it is.
template <int R, typename T>
inline void window_dots(const Layout<T>& layout, const Neighbours& neighbours, const T* const* a, const T* const* rows,
                        const RowRange& range, int64_t offset, const Vec<T>* bias, Vec<T>* out, Vec<T>* max,
                        int64_t vectors) {
  const int64_t k = layout.k, stride = layout.kv_stride;
  for (int64_t u = range.begin; u < range.end; ++u) {
    // The query rows whose windows have row u.
    const int64_t first = u < k ? 0 : (u - k) / stride + 1, last = u / stride < R ? u / stride : R - 1;
    const T* next = rows[u + 1 < range.end ? u + 1 : u];
    const Vec<T>* first_bias = bias + first * 2 * k;
    const int64_t i = u - first * stride;
    dispatch_rows(last - first + 1, [&](auto count) {
      if constexpr (count.value > R) return;
      // A single query row has registers left. With more sums, fewer of the products wait for the one before.
      constexpr int most = count.value == 1 ? MAX_NEIGHBOURS_OF_ONE_ROW : MAX_NEIGHBOURS;
      for (int64_t run = 0; run < neighbours.runs; ++run)
        by_neighbours<most>(neighbours.count(run), [&](auto some, int64_t n) {
          const int64_t at = offset + neighbours.columns[run], j = neighbours.first[run] + n;
          const Bias<T> start{first_bias + i, first_bias + k + j, 2 * k, stride};
          neighbour_dots<count.value, some.value>(a + first, rows[u] + at + n, next + at, layout.depth, layout.stride,
                                                  start, out + first * k * k + i * k + j, k,
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
inline void compute_logits(const Problem& p, const Layout<T>& layout, const Neighbours& neighbours,
                           const Tables<T>& tables, int64_t x0, int64_t vectors, const T* const* q,
                           const T* const* key_rows, const RowRange& range, const TileLogits<T>& logits) {
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
    window_dots<R>(layout, neighbours, q, key_rows, range, layout.margin + x0, logits.bias, logits.data, logits.max,
                   vectors);

  // Left are the logits out of the map, or all without K. They are the bias alone, or masked.
  const bool at_sides = p.mask && !layout.are_inside(x0, vectors * L);
  const bool inside = p.key.data && range.has(0) && range.has(layout.kv_rows(R) - 1);
  if (inside && !at_sides) return;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t r = 0; r < R; ++r) {
      V* window = logits.data + (v * QUERY_ROWS + r) * area;
      const V* bias = logits.bias + (v * QUERY_ROWS + r) * 2 * k;
      for (int64_t i = 0; i < k; ++i) {
        const bool outside = !range.has(r * layout.kv_stride + i);
        if (!p.key.data || outside)
          for (int64_t j = 0; j < k; ++j)
            window[i * k + j] = p.mask && outside ? splat<T>(-__builtin_inf()) : bias[i] + bias[k + j];
        if (p.mask) mask_sides(layout, neighbours, x0 + v * L, window + i * k);
      }
      logits.max[v * QUERY_ROWS + r] = max_of<T>(window, area);
    }
}

}  // namespace
}  // namespace sasa
