// The sums of products, each for up to QUERY_ROWS rows at once:
//   neighbour_dots         S = Q K^T + bias, and dP = dO V^T
//   window_sums            O = P V, and dQ = dS K
//   scatter_add            dV += P^T dO, and dK += dS^T Q
//   relative_bias          bias from Q and the relative tables
//   relative_bias_dquery   what the bias adds to dQ
//   relative_bias_dtable   the gradient of the relative tables
//
// Loads limit these loops, not multiply-adds. The neighbours of a vector of pixels are unaligned vectors, and
// those that straddle two cache lines count twice. So each vector of K or V is loaded once for all query rows.
// And it is loaded for a whole tile of pixels, while it is in the first-level cache.
#pragma once
#include "rows.h"

namespace sasa {
namespace {

// Neighbours in a row of the window whose sums stay in registers, for a single query row.
constexpr int MAX_NEIGHBOURS_OF_ONE_ROW = 9;
// Neighbours, and channels, whose sums for QUERY_ROWS query rows stay in registers.
constexpr int MAX_NEIGHBOURS = VECTOR_REGISTERS >= 32 ? MAX_NEIGHBOURS_OF_ONE_ROW : 4;
constexpr int MAX_CHANNELS = VECTOR_REGISTERS >= 32 ? 8 : 4;
// Vectors of a tile: neighbouring pixels that are computed before the next row or channels are loaded.
constexpr int TILE_VECTORS = 128 / VECTOR_BYTES;

// A number that is known at compile time, as an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Call fn with the neighbours of a row, MOST at once at most: how many, as a constant, and the first.
template <int MOST = MAX_NEIGHBOURS, typename F>
inline void by_neighbours(int64_t k, const F& fn) {
  static_assert(MOST == 4 || MOST == MAX_NEIGHBOURS_OF_ONE_ROW, "the cases below are for these");
  int64_t j = 0;
  if constexpr (MOST > 4) {
    if (k == MOST) return fn(Constant<MOST>(), j);
    for (; j + 7 <= k; j += 7) fn(Constant<7>(), j);
    if (j + 5 <= k) fn(Constant<5>(), j), j += 5;
  }
  for (; j + 4 <= k; j += 4) fn(Constant<4>(), j);
  switch (k - j) {
    case 3: return fn(Constant<3>(), j);
    case 2: return fn(Constant<2>(), j);
    case 1: return fn(Constant<1>(), j);
  }
}

// Call fn with the channels of a head, MAX_CHANNELS at once at most: how many, as a constant, and the first.
template <typename F>
inline void by_channels(int64_t depth, const F& fn) {
  int64_t c = 0;
  for (; c + MAX_CHANNELS <= depth; c += MAX_CHANNELS) fn(Constant<MAX_CHANNELS>(), c);
  for (; c + 2 <= depth; c += 2) fn(Constant<2>(), c);
  for (; c < depth; ++c) fn(Constant<1>(), c);
}

// Call fn with the tiles of a row: the first pixel, and how many vectors.
template <typename T, typename F>
inline void by_tiles(const Layout<T>& layout, const F& fn) {
  constexpr int64_t L = Vector<T>::lanes;
  for (int64_t x = 0; x < layout.padded_width; x += TILE_VECTORS * L) {
    const int64_t left = (layout.padded_width - x) / L;
    fn(x, left < TILE_VECTORS ? left : TILE_VECTORS);
  }
}

// Call fn with a number of query rows as a constant.
template <typename F>
inline void dispatch_rows(int64_t rows, const F& fn) {
  static_assert(QUERY_ROWS == 3, "one case for each number of rows");
  switch (rows) {
    case 3: return fn(Constant<3>());
    case 2: return fn(Constant<2>());
    case 1: return fn(Constant<1>());
  }
}

// The relative bias of a row of K's: one term for that row of the window, and one for each neighbour's column.
// The pointers are of query row 0, and `step` is the distance to the next query row's terms. The same row of K
// is `kv_stride` rows further up in the next query row's window.
template <typename T>
struct Bias {
  const Vec<T>* row;
  const Vec<T>* col;
  int64_t step;
  int64_t kv_stride;

  Vec<T> value(int r, int n) const { return row[r * (step - kv_stride)] + col[r * step + n]; }
};

// out[r][n] = bias + sum over c of a[r][c] * b[c] shifted by n pixels, for R query rows, N neighbours and the
// vectors of a tile. a is Q or dO, and b a row of K or V.
// Where max is given, it becomes the larger of itself and these; a NaN never does.
// From one vector of the tile to the next, out, bias and max advance by those of QUERY_ROWS query rows.
// `next_b` is the row that the next call will read; it is prefetched.
template <int R, int N, typename T>
__attribute__((noinline)) void neighbour_dots(const T* const* a, const T* b, const T* next_b, int64_t depth,
                                              int64_t stride, Bias<T> bias, Vec<T>* out, int64_t k, Vec<T>* max,
                                              int64_t vectors) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const int64_t step = k * k - bias.kv_stride * k;  // from the row of one query row's window to that of the next's
  for (int64_t x = 0; x < vectors; ++x) {
    V sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[r][n] = bias.value(r, n);
    const T *from = b + x * L, *next = next_b + x * L;
    for (int64_t c = 0; c < depth; ++c, from += stride, next += stride) {
      V factor[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) factor[r] = load(a[r] + x * L + c * stride);
      __builtin_prefetch(next);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V shifted = load_once(from + n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][n] += factor[r] * shifted;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) out[r * step + n] = sum[r][n];
      if (!max) continue;
      V most = max[r];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) most = max_vec<T>(sum[r][n], most);
      max[r] = most;
    }
    out += QUERY_ROWS * k * k;
    if (max) max += QUERY_ROWS;
    bias.row += QUERY_ROWS * 2 * k, bias.col += QUERY_ROWS * 2 * k;
  }
}

// bias[r * step + n] = sum over c of q[r][c] * table[c][n], for one vector of pixels, which begins at `offset`.
template <int R, int N, typename T>
inline void relative_bias(const T* const* q, int64_t offset, const T* table, int64_t depth, int64_t stride,
                          int64_t k, Vec<T>* bias, int64_t step) {
  Vec<T> sum[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[r][n] = Vec<T>{};
  for (int64_t c = 0; c < depth; ++c) {
    Vec<T> factor[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factor[r] = load(q[r] + offset + c * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][n] += factor[r] * table[c * k + n];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) bias[r * step + n] = sum[r][n];
}

// dq[r][c] += sum over j of table[c][j] * dbias[r][j], for the channels c in [first, end). The table begins
// with channel `first`.
template <int R, int N, typename T>
inline __attribute__((always_inline)) void relative_bias_dquery(const T* table, const T* dbias, int64_t k,
                                                                int64_t stride, int first, int end,
                                                                Vec<T> (&dq)[R][N]) {
  for (int64_t j = 0; j < k; ++j) {
    Vec<T> factor[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) factor[r] = load(dbias + (r * k + j) * stride);
#pragma GCC unroll 16
    for (int c = first; c < end; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) dq[r][c] += table[(c - first) * k + j] * factor[r];
  }
}

// dtable[n] += sum over the pixels of a row of q * dbias[n], lane by lane.
template <int N, typename T>
inline void relative_bias_dtable(const T* q, const T* dbias, int64_t padded_width, int64_t stride,
                                 Vec<T>* dtable) {
  Vec<T> sum[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sum[n] = dtable[n];
  for (int64_t x = 0; x < padded_width; x += Vector<T>::lanes) {
    const Vec<T> factor = load(q + x);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[n] += factor * load(dbias + n * stride + x);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) dtable[n] = sum[n];
}

// Source rows, and the weights by which they are summed into target rows. In window_sums rows of K or V are
// summed into query rows; in scatter_add it is the other way round.
template <typename T>
struct WeightedRows {
  const T* const* rows;  // [source]
  int64_t k, stride;
  // The weight of target row 0, source row 0 and its first neighbour, and the distances to the next of each.
  const T* weights;
  int64_t target_stride, source_stride, neighbour_stride;
};

// The same for rows of K or V, and where a vector of queries finds its neighbours in each.
template <typename T>
struct KvRows : WeightedRows<T> {
  int64_t kv_stride;
  const Neighbours& neighbours;
};

// Add source row s to sum[t][n], by so many neighbours side by side, for the target rows t from FIRST to LAST.
template <int FIRST, int LAST, int R, int N, typename T>
inline __attribute__((always_inline)) void add_source_row(const KvRows<T>& weighted, int64_t s,
                                                          int64_t offset, int64_t neighbours, const T* weights,
                                                          Vec<T> (&sum)[R][N]) {
  const T* row = weighted.rows[s] + offset;
  // The next call for this row will read the channels after these.
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) __builtin_prefetch(row + (N + n) * weighted.stride);
  for (int64_t j = 0; j < neighbours; ++j, weights += weighted.neighbour_stride) {
    Vec<T> weight[R];
#pragma GCC unroll 4
    for (int t = FIRST; t <= LAST; ++t) weight[t] = load(weights + t * weighted.target_stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> shifted = load_once(row + n * weighted.stride + j);
#pragma GCC unroll 4
      for (int t = FIRST; t <= LAST; ++t) sum[t][n] += weight[t] * shifted;
    }
  }
}

// sum[t][n] = sum over s, j of weights[s][t][j] * rows[s][n] at neighbour j, for R query rows t,
// N channels n and one vector of pixels. s runs over the rows of K or V that are in the window of query row t
// and in the map.
// finish(sum) takes the sums. It is a copy: stores may alias what is behind a reference.
// Rows are added one by one, so that the bits do not depend on which query rows are computed together.
template <int R, int N, typename T, typename Finish>
__attribute__((noinline)) void window_sums(const KvRows<T>& weighted, const RowRange& range,
                                           int64_t offset, int64_t weight_offset, Finish finish,
                                           Prefetcher::Cursor* prefetch = nullptr) {
  Vec<T> sum[R][N]{};
  const Neighbours& neighbours = weighted.neighbours;
  const int64_t k = weighted.k, kv_stride = weighted.kv_stride;
  Prefetcher::Cursor cursor;
  if (prefetch) cursor = *prefetch;
  for (int64_t run = 0; run < neighbours.runs; ++run) {
    int64_t s = range.begin;
    const T* weights = weighted.weights + weight_offset + s * weighted.source_stride +
                       neighbours.first[run] * weighted.neighbour_stride;
    const int64_t first = offset + neighbours.columns[run], count = neighbours.count(run);
    // Add the source rows before `bound`, which are in the windows of the query rows `from` to `to`.
    const auto add_until = [&](int64_t bound, auto from, auto to) __attribute__((always_inline)) {
      if (bound > range.end) bound = range.end;
      for (; s < bound; ++s, weights += weighted.source_stride) {
        cursor.step();
        add_source_row<from.value, to.value>(weighted, s, first, count, weights, sum);
      }
    };
    // Leave out the source rows before `bound`, which are in no window.
    const auto skip_until = [&](int64_t bound) {
      if (bound > range.end) bound = range.end;
      if (bound > s) weights += (bound - s) * weighted.source_stride, s = bound;
    };
    const Constant<0> top;
    const Constant<1> middle;
    const Constant<R - 1> bottom;
    if (k >= (R - 1) * kv_stride) {
      if constexpr (R > 1) add_until(kv_stride, top, top);
      if constexpr (R > 2) add_until(2 * kv_stride, top, middle);
      add_until(k, top, bottom);
      if constexpr (R > 2) add_until(k + kv_stride, middle, bottom);
      if constexpr (R > 1) add_until(k + (R - 1) * kv_stride, bottom, bottom);
    } else if constexpr (R > 1) {  // the last window begins after the first ends
      const int64_t alone = k < kv_stride ? k : kv_stride;
      add_until(alone, top, top);
      skip_until(kv_stride);
      if constexpr (R > 2) {
        add_until(k, top, middle);
        add_until(kv_stride + alone, middle, middle);
        skip_until(2 * kv_stride);
        add_until(k + kv_stride, middle, bottom);
      }
      add_until(k + (R - 1) * kv_stride, bottom, bottom);
    }
  }
  if (prefetch) *prefetch = cursor;
  finish(sum);
}

// Stores sums into some channels of R packed rows.
template <int R, typename T>
struct RowWriter {
  T* row[R];
  int64_t stride;

  RowWriter(T* const* rows, int64_t offset, int64_t stride) : stride(stride) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = rows[r] + offset;
  }
  template <int N>
  void write(const Vec<T> (&sum)[R][N]) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(row[r] + n * stride, sum[r][n]);
  }
};

// to[t][n] += sum over j, s of weights[s][t][j] * rows[s][n] shifted by j pixels to the left, for N channels n
// and the vectors of a tile. Source rows s are three query rows, and target rows t three rows of dK or dV.
// Target row t is in the window of query row s where t - s is LOW to HIGH. Targets are `column` elements
// further into their rows than sources.
// With a stride, rows and neighbours are those of one remainder: they lie to each other as those of ordinary windows.
// All is one loop. With a loop for each source row, half of the time went by between the loops.
template <int LOW, int HIGH, int N, typename T>
__attribute__((noinline)) void scatter_add(const WeightedRows<T>& weighted, int64_t x, int64_t channel,
                                           T* const* to, int64_t column, int64_t vectors) {
  const int64_t k = weighted.k, stride = weighted.stride;
  const int64_t target_stride = weighted.target_stride, neighbour_stride = weighted.neighbour_stride;
  for (int64_t v = 0; v < vectors; ++v, x += Vector<T>::lanes) {
    Vec<T> sum[QUERY_ROWS][N]{};
    const T *row[QUERY_ROWS], *weights[QUERY_ROWS];
#pragma GCC unroll 4
    for (int s = 0; s < QUERY_ROWS; ++s) {
      row[s] = weighted.rows[s] + x + channel;
      weights[s] = weighted.weights + x + s * weighted.source_stride;
    }
    for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 4
      for (int s = 0; s < QUERY_ROWS; ++s) {
        if (s + HIGH < 0) continue;
        Vec<T> weight[QUERY_ROWS];
#pragma GCC unroll 4
        for (int t = 0; t < QUERY_ROWS; ++t)
          if (t - s >= LOW && t - s <= HIGH) weight[t] = load(weights[s] + t * target_stride);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const Vec<T> shifted = load_once(row[s] + n * stride);
#pragma GCC unroll 4
          for (int t = 0; t < QUERY_ROWS; ++t)
            if (t - s >= LOW && t - s <= HIGH) sum[t][n] += weight[t] * shifted;
        }
        --row[s], weights[s] += neighbour_stride;
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < QUERY_ROWS; ++t)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        T* target = to[t] + x + channel + column + n * stride;
        store(target, load(target) + sum[t][n]);
      }
  }
}

// Call fn with scatter_add's LOW and HIGH as constants, where windows have k rows, and that of query row 0 begins `above`
// rows above target row 0.
template <typename F>
inline void dispatch_row_offsets(int64_t above, int64_t k, const F& fn) {
  static_assert(QUERY_ROWS == 3, "all cases that there are");
  if (above == 0 && k <= 2) return k == 1 ? fn(Constant<0>(), Constant<0>()) : fn(Constant<0>(), Constant<1>());
  if (above == 0) return fn(Constant<0>(), Constant<2>());
  switch (k - 1 - above) {
    case -2: return fn(Constant<-2>(), Constant<-2>());
    case -1: return fn(Constant<-2>(), Constant<-1>());
    case 0: return fn(Constant<-2>(), Constant<0>());
    case 1: return fn(Constant<-2>(), Constant<1>());
    default: return fn(Constant<-2>(), Constant<2>());
  }
}

}  // namespace
}  // namespace sasa
