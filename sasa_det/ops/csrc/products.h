// The products of local attention: of queries with the keys of their windows, and sums over windows.
//
// Loads limit these loops, not products: a window's shifted vectors are unaligned, and many count twice. So
// GROUP rows of queries advance together, every vector of a key or a value that is loaded serves all of them,
// and what is loaded serves a whole tile of pixels while it is in the first cache.

#include "rows.h"

namespace sasa {
namespace {

// Neighbours in a row, and channels, of which GROUP times as many sums stay in registers.
constexpr int MAX_NEIGHBOURS = VECTOR_REGISTERS >= 32 ? 9 : 4;
constexpr int MAX_CHANNELS = VECTOR_REGISTERS >= 32 ? 8 : 4;
// Vectors of pixels that are computed in turn before the next row, or the next channels, are touched.
constexpr int TILE = 128 / VECTOR_BYTES;

template <int N>
struct Count {
  static constexpr int value = N;
};

// Call fn with the number of neighbours as a compile-time constant, k at once or in pieces, of MOST at the most.
template <int MOST = MAX_NEIGHBOURS, typename F>
inline void in_pieces(int64_t k, const F& fn) {
  int64_t n = 0;
  if constexpr (MOST >= 9) {
    if (k == 9) return fn(Count<9>(), n);
    for (; n + 7 <= k; n += 7) fn(Count<7>(), n);
    if (n + 5 <= k) fn(Count<5>(), n), n += 5;
  }
  for (; n + 4 <= k; n += 4) fn(Count<4>(), n);
  switch (k - n) {
    case 3: return fn(Count<3>(), n);
    case 2: return fn(Count<2>(), n);
    case 1: return fn(Count<1>(), n);
  }
}

// Call fn with a number of channels as a compile-time constant.
template <typename F>
inline void by_channels(int64_t depth, const F& fn) {
  int64_t c = 0;
  for (; c + MAX_CHANNELS <= depth; c += MAX_CHANNELS) fn(Count<MAX_CHANNELS>(), c);
  for (; c + 2 <= depth; c += 2) fn(Count<2>(), c);
  for (; c < depth; ++c) fn(Count<1>(), c);
}

// Call fn with the first pixel of each tile of a row and the number of its vectors.
template <typename T, typename F>
inline void by_tiles(const Layout<T>& at, const F& fn) {
  constexpr int64_t L = Vector<T>::lanes;
  for (int64_t x = 0; x < at.padded; x += TILE * L) {
    const int64_t left = (at.padded - x) / L;
    fn(x, left < TILE ? left : TILE);
  }
}

// Call fn with the number of rows in a group as a compile-time constant.
template <typename F>
inline void as_group(int64_t rows, const F& fn) {
  static_assert(GROUP == 3, "one case for each number of rows");
  switch (rows) {
    case 3: return fn(Count<3>());
    case 2: return fn(Count<2>());
    case 1: return fn(Count<1>());
  }
}

// What logits begin with: the sum of a term of the window's row and one of its column. Window g's begin at
// g * step; it sees the same row of the map one row further up.
template <typename T>
struct Bias {
  const Vec<T>* row;
  const Vec<T>* col;
  int64_t step;

  Vec<T> at(int g, int n) const { return row[g * (step - 1)] + col[g * step + n]; }
};

// out[g][n] = bias + sum over c of a[g][c] * b[c] shifted by n pixels, for a tile's vectors of pixels, and
// peak, where there is one, the larger of it and the largest of them. A NaN never becomes the largest. What
// belongs to the next vector lies GROUP windows, biases or peaks further on. What the next row of the windows
// will read of b is fetched meanwhile from `soon`.
template <int G, int N, typename T>
__attribute__((noinline)) void dots(const T* const* a, const T* b, const T* soon, int64_t depth,
                                    int64_t stride, Bias<T> bias, Vec<T>* out, int64_t k, Vec<T>* peak,
                                    int64_t vectors) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const int64_t step = k * k - k;
  for (int64_t x = 0; x < vectors; ++x) {
    V sum[G][N];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[g][n] = bias.at(g, n);
    const T *from = b + x * L, *next = soon + x * L;
    for (int64_t c = 0; c < depth; ++c, from += stride, next += stride) {
      V factor[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) factor[g] = load(a[g] + x * L + c * stride);
      __builtin_prefetch(next);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const V shifted = load_once(from + n);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g][n] += factor[g] * shifted;
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) out[g * step + n] = sum[g][n];
      if (!peak) continue;
      V most = peak[g];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) most = larger<T>(sum[g][n], most);
      peak[g] = most;
    }
    out += GROUP * k * k;
    if (peak) peak += GROUP;
    bias.row += GROUP * 2 * k, bias.col += GROUP * 2 * k;
  }
}

// out[g * step + n] = sum over c of a[g][c] * table[c][n], for the vector of pixels at the offset.
template <int G, int N, typename T>
inline void table_dots(const T* const* a, int64_t offset, const T* table, int64_t depth, int64_t stride,
                       int64_t k, Vec<T>* out, int64_t step) {
  Vec<T> sum[G][N];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[g][n] = Vec<T>{};
  for (int64_t c = 0; c < depth; ++c) {
    Vec<T> factor[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) factor[g] = load(a[g] + offset + c * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g][n] += factor[g] * table[c * k + n];
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) out[g * step + n] = sum[g][n];
}

// sum[g][n] += sum over t of table[n][t] * by[g][t], for the channels from first, with which the table begins, to
// before end.
template <int G, int N, typename T>
inline __attribute__((always_inline)) void add_table(const T* table, const T* by, int64_t k, int64_t stride, int first,
                                                     int end, Vec<T> (&sum)[G][N]) {
  for (int64_t t = 0; t < k; ++t) {
    Vec<T> weight[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) weight[g] = load(by + (g * k + t) * stride);
#pragma GCC unroll 16
    for (int n = first; n < end; ++n)
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g][n] += table[(n - first) * k + t] * weight[g];
  }
}

// out[n] += sum over pixels of a * b[n], lane by lane.
template <int N, typename T>
inline void row_dots(const T* a, const T* b, int64_t padded, int64_t stride, Vec<T>* out) {
  Vec<T> sum[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t x = 0; x < padded; x += Vector<T>::lanes) {
    const Vec<T> factor = load(a + x);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[n] += factor * load(b + n * stride + x);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// What the sums of a group run over: rows of a map, and for each the weights of each sum.
template <typename T>
struct Span {
  const T* const* rows;  // [s]
  int64_t k, stride;
  // Of sum 0, row 0 and its first neighbour, and how far it is to the next of each.
  const T* weights;
  int64_t next_sum, next_row, next_neighbour;
  int64_t begin, end;  // of the rows, those that lie in the map
};

// Add to sum[g][n] row s of a span, for the sums FIRST to LAST.
template <int FIRST, int LAST, int G, int N, typename T>
inline __attribute__((always_inline)) void add_row(const Span<T>& span, int64_t s, int64_t offset,
                                                   const T* weights, Vec<T> (&sum)[G][N]) {
  const T* row = span.rows[s] + offset;
  // What the next channels will read of it.
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) __builtin_prefetch(row + (N + n) * span.stride);
  for (int64_t j = 0; j < span.k; ++j, weights += span.next_neighbour) {
    Vec<T> weight[G];
#pragma GCC unroll 4
    for (int g = FIRST; g <= LAST; ++g) weight[g] = load(weights + g * span.next_sum);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> shifted = load_once(row + n * span.stride + j);
#pragma GCC unroll 4
      for (int g = FIRST; g <= LAST; ++g) sum[g][n] += weight[g] * shifted;
    }
  }
}

// Sums over the windows of a group, for one vector of pixels and N channels, which are handed to use(sum):
// sum[g][n] = sum over s, j of weights[s][g][j] * rows[s][n] shifted by j pixels, where window g has row s.
// use is by value, as stores may alias what is captured by reference. Rows are added one by one, so that the bits do
// not depend on where a group begins. Meanwhile lines of a map are brought in.
template <int G, int N, typename T, typename Use>
__attribute__((noinline)) void window_sums(const Span<T>& span, int64_t offset, int64_t weight_offset, Use use,
                                           Walk* fetching = nullptr) {
  Vec<T> sum[G][N]{};
  const int64_t k = span.k;
  int64_t s = span.begin;
  const T* weights = span.weights + weight_offset + s * span.next_row;
  Walk walk;
  if (fetching) walk = *fetching;
  // Rows up to a bound, which belong to the sums first to last.
  const auto until = [&](int64_t bound, auto first, auto last) __attribute__((always_inline)) {
    if (bound > span.end) bound = span.end;
    for (; s < bound; ++s, weights += span.next_row) {
      walk.go_on();
      add_row<first.value, last.value>(span, s, offset, weights, sum);
    }
  };
  const Count<0> top;
  const Count<1> middle;
  const Count<G - 1> bottom;
  if (k >= G) {
    if constexpr (G > 1) until(1, top, top);
    if constexpr (G > 2) until(2, top, middle);
    until(k, top, bottom);
    if constexpr (G > 2) until(k + 1, middle, bottom);
    if constexpr (G > 1) until(k + G - 1, bottom, bottom);
  } else if constexpr (G > 1) {  // a row and a sum for each other: k is odd, and 1
    until(1, top, top);
    if constexpr (G > 2) until(2, middle, middle);
    until(G, bottom, bottom);
  }
  if (fetching) *fetching = walk;
  use(sum);
}

// Where sums belong: some channels of G packed rows.
template <int G, typename T>
struct Places {
  T* row[G];
  int64_t stride;  // from a channel to the next

  Places(T* const* rows, int64_t offset, int64_t stride) : stride(stride) {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) row[g] = rows[g] + offset;
  }
  template <int N>
  void write(const Vec<T> (&sum)[G][N]) const {
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(row[g] + n * stride, sum[g][n]);
  }
};

// Add to a group of rows, for N channels of a tile, what a group of rows spreads over them:
// to[g][n] += sum over j, s of weights[s][g][j] * rows[s][n] shifted by j pixels to the left, g - s being LOW to HIGH.
// In one loop: row by row, as much time went by between the loops as in them.
template <int LOW, int HIGH, int N, typename T>
__attribute__((noinline)) void spread_group(const Span<T>& span, int64_t x, int64_t channel, T* const* to,
                                            int64_t vectors) {
  const int64_t k = span.k, stride = span.stride, next_sum = span.next_sum, next_neighbour = span.next_neighbour;
  for (int64_t v = 0; v < vectors; ++v, x += Vector<T>::lanes) {
    Vec<T> sum[GROUP][N]{};
    const T *row[GROUP], *weights[GROUP];
#pragma GCC unroll 4
    for (int s = 0; s < GROUP; ++s) {
      row[s] = span.rows[s] + x + channel;
      weights[s] = span.weights + x + s * span.next_row;
    }
    for (int64_t j = 0; j < k; ++j) {
#pragma GCC unroll 4
      for (int s = 0; s < GROUP; ++s) {
        if (s + HIGH < 0) continue;
        Vec<T> weight[GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g)
          if (g - s >= LOW && g - s <= HIGH) weight[g] = load(weights[s] + g * next_sum);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const Vec<T> shifted = load_once(row[s] + n * stride);
#pragma GCC unroll 4
          for (int g = 0; g < GROUP; ++g)
            if (g - s >= LOW && g - s <= HIGH) sum[g][n] += weight[g] * shifted;
        }
        --row[s], weights[s] += next_neighbour;
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        T* place = to[g] + x + channel + n * stride;
        store(place, load(place) + sum[g][n]);
      }
  }
}

// Call fn with the least and the largest g - s for which the window of row s has row g, where the window of s = 0
// begins `above` rows above g = 0.
template <typename F>
inline void as_spread(int64_t above, int64_t k, const F& fn) {
  static_assert(GROUP == 3, "all that there are, for odd windows");
  if (above == 0) return k == 1 ? fn(Count<0>(), Count<0>()) : fn(Count<0>(), Count<2>());
  switch (k - 1 - above) {
    case -2: return fn(Count<-2>(), Count<-2>());
    case -1: return fn(Count<-2>(), Count<-1>());
    case 0: return fn(Count<-2>(), Count<0>());
    case 1: return fn(Count<-2>(), Count<1>());
    default: return fn(Count<-2>(), Count<2>());
  }
}

}  // namespace
}  // namespace sasa
