// The kernels themselves, included by one file for each CPU capability, which sets VECTOR_BYTES and
// VECTOR_REGISTERS. Everything is in an unnamed namespace: see problem.h for why.
//
// A band is streamed row by row. The k rows of keys and values that a row of queries sees lie packed in
// a ring, one vector of neighbouring pixels after the other, in the compute type and with a margin of
// zeros, so that strides, layouts, types, dilation and borders end where packing ends. All loops over
// pixels are whole vectors; lanes past the last pixel compute on zeros and are not stored.
//
// No sum runs over more than one thread or depends on how a map is cut into bands: the same input gives
// the same bits at any thread count.

#include "products.h"

namespace sasa {
namespace {

// Rows that the windows of a group span.
inline int64_t span_of(int64_t k) { return k + GROUP - 1; }

template <typename T>
inline T* logsumexp_row(const Problem& p, const Band& band, int64_t y) {
  return static_cast<T*>(p.logsumexp) +
         ((band.image * p.heads + band.head) * p.height + band.phase_row + y * p.dilation) * p.width +
         band.phase_col;
}

// Where the sums over TABLE_ROWS rows of a band are added; see problem.h.
template <typename T>
inline T* table_grads(const Problem& p, const Band& band, int64_t block) {
  const int64_t group = (band.image * p.heads + band.head) * table_groups(p) + band.group;
  return static_cast<T*>(p.table_grads) + (group * blocks(p) + block) * p.depth * p.kernel_size;
}

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

// ---- Logits of a tile. ----

// Close the positions of a window's row that lie left or right of the map.
template <typename T>
inline void close_sides(const Layout<T>& at, int64_t x, Vec<T>* row) {
  typedef typename Vector<T>::type V;
  if (x >= at.radius && x + Vector<T>::lanes + at.radius <= at.width) return;
  V place;
  for (int n = 0; n < Vector<T>::lanes; ++n) place[n] = T(x + n - at.radius);
  for (int64_t j = 0; j < at.k; ++j) {
    const V col = place + T(j);
    const auto outside = (col < T(0)) | (col >= T(at.width));
    row[j] = outside ? splat<T>(-__builtin_inf()) : row[j];
  }
}

// Of the rows that the windows of a group span, those that lie in the map.
struct Seen {
  int64_t top, begin, end;

  template <typename T>
  Seen(const Layout<T>& at, int64_t y, int64_t rows) : top(y - at.radius) {
    const int64_t below = at.height - top, all = at.k + rows - 1;
    begin = top < 0 ? -top : 0;
    end = below < all ? below : all;
  }
  bool has(int64_t u) const { return u >= begin && u < end; }

  // Where they are in a ring.
  template <typename T>
  void point(const Ring<T>& ring, const T** to) const {
    ring.point(top + begin, end - begin, 0, to + begin);
  }
};

// What is computed of a tile, for each vector of pixels and row of the group.
template <typename T>
struct Logits {
  Vec<T>* logits;  // [vector][row][k * k]
  Vec<T>* bias;    // [vector][row][2 * k]: of the window's rows and columns
  Vec<T>* peak;    // [vector][row]

  Logits(Scratch<T>& scratch, int64_t k) {
    constexpr int64_t each = TILE * GROUP * Vector<T>::lanes;
    logits = reinterpret_cast<Vec<T>*>(scratch.take(each * k * k));
    bias = reinterpret_cast<Vec<T>*>(scratch.take(each * 2 * k));
    peak = reinterpret_cast<Vec<T>*>(scratch.take(each));
  }
  static int64_t elements(int64_t k) { return TILE * GROUP * Vector<T>::lanes * (k * k + 2 * k + 1); }
};

// The rows that the windows of a group span, with what was computed of a tile as their weights.
template <typename T>
inline Span<T> weighted(const Layout<T>& at, const Logits<T>& tile, const T* const* rows, const Seen& seen) {
  constexpr int64_t L = Vector<T>::lanes;
  const int64_t k = at.k;
  const T* weights = reinterpret_cast<const T*>(tile.logits);
  return {rows, k, at.stride, weights, (k * k - k) * L, k * L, L, seen.begin, seen.end};
}

// out[g][i][j] = bias[g] + a[g] . rows[i + g] shifted by j, for a tile and the windows of G rows. What lies in
// no row of the map is left as it is.
template <int G, typename T>
inline void window_dots(const Layout<T>& at, const T* const* a, const T* const* rows, const Seen& seen,
                        int64_t offset, const Vec<T>* bias, Vec<T>* out, Vec<T>* peak, int64_t vectors) {
  const int64_t k = at.k;
  for (int64_t u = seen.begin; u < seen.end; ++u) {
    const int64_t first = u < k ? 0 : u - k + 1, last = u < G ? u : G - 1;
    const T* soon = rows[u + 1 < seen.end ? u + 1 : u];
    const Vec<T>* own = bias + first * 2 * k;
    as_group(last - first + 1, [&](auto count) {
      if constexpr (count.value > G) return;
      // A row alone takes few registers, and each product of few sums would wait for the one before.
      in_pieces<count.value == 1 ? 9 : MAX_NEIGHBOURS>(k, [&](auto neighbours, int64_t n) {
        const Bias<T> start{own + u - first, own + k + n, 2 * k};
        dots<count.value, neighbours.value>(a + first, rows[u] + offset + n, soon + offset, at.depth,
                                            at.stride, start,
                                            out + first * k * k + (u - first) * k + n, k,
                                            peak ? peak + first : nullptr, vectors);
      });
    });
  }
}

// The largest of n vectors, lane by lane, in four chains that do not wait for each other. A NaN never
// becomes the largest; it comes out of the sum of the exponentials all the same.
template <typename T>
inline Vec<T> largest(const Vec<T>* x, int64_t n) {
  Vec<T> peak[4];
  for (int m = 0; m < 4; ++m) peak[m] = splat<T>(-__builtin_inf());
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) peak[m] = larger<T>(x[i + m], peak[m]);
  for (; i < n; ++i) peak[0] = larger<T>(x[i], peak[0]);
  for (int m = 1; m < 4; ++m) peak[0] = larger<T>(peak[m], peak[0]);
  return peak[0];
}

// The logits of a tile's windows, and the largest of each: of G rows, whose queries are q.
template <int G, typename T>
inline void tile_logits(const Problem& p, const Layout<T>& at, const Tables<T>& tables, int64_t x0,
                        int64_t vectors, const T* const* q, const T* const* key_rows, const Seen& seen,
                        const Logits<T>& to) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const int64_t k = at.k, half = at.depth / 2, window = k * k;
  for (int64_t v = 0; v < vectors; ++v) {
    V* bias = to.bias + v * GROUP * 2 * k;
    if (tables.row)
      in_pieces(k, [&](auto count, int64_t n) {
        table_dots<G, count.value>(q, v * L, tables.row + n, half, at.stride, k, bias + n, 2 * k);
        table_dots<G, count.value>(q, v * L + half * at.stride, tables.col + n, half, at.stride, k,
                                   bias + k + n, 2 * k);
      });
    for (int g = 0; g < G; ++g) to.peak[v * GROUP + g] = splat<T>(-__builtin_inf());
  }
  if (p.key.data)
    window_dots<G>(at, q, key_rows, seen, at.margin + x0 - at.radius, to.bias, to.logits, to.peak, vectors);

  // Outside of the map, and everywhere where there is no key, logits are the bias of row and column, or closed.
  const bool at_sides = p.mask && (x0 < at.radius || x0 + vectors * L + at.radius > at.width);
  const bool inside = p.key.data && seen.has(0) && seen.has(k + G - 2);
  if (inside && !at_sides) return;
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t g = 0; g < G; ++g) {
      V* own = to.logits + (v * GROUP + g) * window;
      const V* bias = to.bias + (v * GROUP + g) * 2 * k;
      for (int64_t i = 0; i < k; ++i) {
        const bool outside = !seen.has(g + i);
        if (!p.key.data || outside)
          for (int64_t j = 0; j < k; ++j)
            own[i * k + j] = p.mask && outside ? splat<T>(-__builtin_inf()) : bias[i] + bias[k + j];
        if (p.mask) close_sides(at, x0 + v * L, own + i * k);
      }
      to.peak[v * GROUP + g] = largest<T>(own, window);
    }
}

// Into how many pieces, of a vector of pixels and some channels, sums over windows cut a row, or nearly so.
template <typename T>
inline int64_t pieces(const Layout<T>& at) {
  return at.padded / Vector<T>::lanes * ((at.depth + MAX_CHANNELS - 1) / MAX_CHANNELS);
}

// ---- Forward. ----

// The weights of a window's pixels, not yet divided by their sum, in the place of their logits; returns the sum.
template <typename T>
__attribute__((noinline)) Vec<T> exponentials(Vec<T>* x, int64_t n, Vec<T> peak) {
  Vec<T> total = Vec<T>{};
#pragma GCC unroll 4
  for (int64_t m = 0; m < n; ++m) {
    x[m] = exp2_vec(x[m] - peak);
    total += x[m];
  }
  return total;
}

template <typename T>
void forward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> at(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = at.k, radius = at.radius, window = k * k, span = span_of(k);
  Ring<T> keys{has_key ? scratch.take(span * at.map_row()) : nullptr, span, at.map_row()};
  Ring<T> values{scratch.take(span * at.map_row()), span, at.map_row()};
  const Ring<T> queries{scratch.take(GROUP * at.map_row()), GROUP, at.map_row()};
  const Ring<T> out{scratch.take(GROUP * at.map_row()), GROUP, at.map_row()};
  const Logits<T> tile(scratch, k);
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head);
  const T* key_rows[LARGEST_SPAN];
  const T* value_rows[LARGEST_SPAN];

  int64_t next = band.first > radius ? band.first - radius : 0;  // row to bring in
  for (int64_t y = band.first; y < band.last; y += GROUP) {
    const int64_t rows = band.last - y < GROUP ? band.last - y : GROUP;
    const int64_t end = y + rows + radius < at.height ? y + rows + radius : at.height;
    if (has_key) pack(p.key, p, at, band, next, end - next, T(1), keys);
    pack(p.value, p, at, band, next, end - next, T(1), values);
    pack(p.query, p, at, band, y, rows, T(p.scale * LOG2_E), queries);
    next = end;
    const Seen seen(at, y, rows);
    if (has_key) seen.point(keys, key_rows);
    seen.point(values, value_rows);
    // What the next group will read, and where this one will write.
    Fetch fetch(p, band);
    const int64_t coming = band.last - y - rows < GROUP ? band.last - y - rows : GROUP;
    const int64_t entering = at.height - next < coming ? at.height - next : coming;
    fetch.add(p.key, next, entering);
    fetch.add(p.value, next, entering);
    fetch.add(p.query, y + rows, coming);
    fetch.add(p.output, y, rows);
    fetch.over(pieces(at), seen.end - seen.begin);
    const Span<T> window_values = weighted(at, tile, value_rows, seen);
    T* to[GROUP];
    out.point(y, rows, at.margin, to);

    as_group(rows, [&](auto group) {
      constexpr int G = group.value;
      by_tiles(at, [&](int64_t x0, int64_t vectors) {
        const T* here[G];
        queries.point(y, G, at.margin + x0, here);
        tile_logits<G>(p, at, tables, x0, vectors, here, key_rows, seen, tile);
        for (int64_t v = 0; v < vectors; ++v)
          for (int g = 0; g < G; ++g) {
            const V peak = tile.peak[v * GROUP + g];
            const V total = exponentials<T>(tile.logits + (v * GROUP + g) * window, window, peak);
            tile.peak[v * GROUP + g] = T(1) / total;
            const V sum = peak + log_vec(total) * T(LOG2_E);
            const int64_t x = x0 + v * L;
            T* lse = logsumexp_row<T>(p, band, y + g) + x * p.dilation;
            if (p.dilation == 1 && x + L <= at.width)
              store(lse, sum);
            else
              for (int n = 0; n < L && x + n < at.width; ++n) lse[n * p.dilation] = sum[n];
          }
        by_channels(at.depth, [&](auto count, int64_t c) {
          constexpr int N = count.value;
          for (int64_t v = 0; v < vectors; ++v) {
            const Places<G, T> places(to, x0 + v * L + c * at.stride, at.stride);
            const V* share = tile.peak + v * GROUP;
            const auto put = [=](V(&sum)[G][N]) __attribute__((always_inline)) {
#pragma GCC unroll 4
              for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) sum[g][n] *= share[g];
              places.write(sum);
            };
            window_sums<G, N>(window_values, at.margin + x0 + v * L - radius + c * at.stride,
                              v * GROUP * window * L, put, &fetch.next());
          }
        });
      });
    });
    unpack(p.output, p, at, band, y, rows, T(1), out);
  }
}

// ---- Backward. ----

// Of one vector of pixels, from logits and d loss / d weight: weights and d loss / d logit, in their place and
// in w and d, each at its neighbour; and the sums of the latter by the window's rows and columns. By value, as
// these stores may alias whatever a lambda captures by reference, which would be loaded again.
template <typename T>
__attribute__((noinline)) void pull_weights(int64_t k, int64_t stride, Vec<T> lse, Vec<T>* weight, Vec<T>* pull,
                                            Vec<T>* cols, T* w, T* d, T* by_row, T* by_col) {
  Vec<T> mean = Vec<T>{};  // of d loss / d weight, by the weights: what softmax takes off each
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      weight[n] = exp2_vec(weight[n] - lse);
      store(w + n * stride + j, weight[n]);
      pull[n] *= weight[n];
      mean += pull[n];
    }
  for (int64_t j = 0; j < k; ++j) cols[j] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<T> total = Vec<T>{};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      pull[n] -= mean * weight[n];
      store(d + n * stride + j, pull[n]);
      total += pull[n];
      cols[j] += pull[n];
    }
    store(by_row + i * stride, total);
  }
  for (int64_t j = 0; j < k; ++j) store(by_col + j * stride, cols[j]);
}

template <typename T>
void backward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> at(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = at.k, radius = at.radius, half = at.depth / 2, window = k * k, span = span_of(k);
  Ring<T> keys{has_key ? scratch.take(span * at.map_row()) : nullptr, span, at.map_row()};
  Ring<T> values{scratch.take(span * at.map_row()), span, at.map_row()};
  Ring<T> key_grads{has_key ? scratch.take(span * at.map_row()) : nullptr, span, at.map_row()};
  Ring<T> value_grads{scratch.take(span * at.map_row()), span, at.map_row()};
  const Ring<T> queries{scratch.take(GROUP * at.map_row()), GROUP, at.map_row()};
  const Ring<T> grads{scratch.take(GROUP * at.map_row()), GROUP, at.map_row()};
  const Ring<T> out{scratch.take(GROUP * at.map_row()), GROUP, at.map_row()};
  T* spare = scratch.take(at.map_row());  // for what is spread over rows that are not the band's
  // Of each row of the group and neighbour of the window, a row of weights, and of what they pull at the
  // logits, d loss / d logit: in the place of the neighbour, for the sums over the queries that see it.
  T* weights = scratch.take(GROUP * at.pair_row());
  T* pulls = scratch.take(GROUP * at.pair_row());
  T* by_row = scratch.take(GROUP * k * at.stride);
  T* by_col = scratch.take(GROUP * k * at.stride);
  T* shift = scratch.take(GROUP * at.stride);
  const Logits<T> tile(scratch, k), pull(scratch, k);
  V* table_sums = reinterpret_cast<V*>(scratch.take(at.depth * k * L));
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  clear(reinterpret_cast<T*>(table_sums), at.depth * k * L);
  const Tables<T> tables = tables_of<T>(p, band.head);

  const T* key_rows[LARGEST_SPAN];
  const T* value_rows[LARGEST_SPAN];

  // Add to the gradients of keys or values what the queries of a group add.
  auto spread = [&](int64_t y, const T* pairs, const Ring<T>& maps, const Ring<T>& results) {
    const T* rows[GROUP];
    maps.point(y, GROUP, at.margin + radius, rows);
    const int64_t top = y - radius, down = k * at.stride;  // from a row of the windows to the next
    T* to[LARGEST_SPAN];
    for (int64_t n = 0; n < round_up(span, GROUP); ++n) {
      const bool own = n < span && top + n >= band.first && top + n < band.last;
      to[n] = at.margin + (own ? results.row(top + n) : spare);
    }
    by_tiles(at, [&](int64_t x0, int64_t vectors) {
      by_channels(at.depth, [&](auto count, int64_t c) {
        for (int64_t n = 0; n < span; n += GROUP) {
          if (top + n + GROUP <= band.first || top + n >= band.last) continue;
          const Span<T> seeing{rows, k, at.stride, pairs + at.margin + n * down, down, at.pair_row() - down, at.stride,
                               0, GROUP};
          as_spread(n, k, [&](auto low, auto high) {
            spread_group<low.value, high.value, count.value>(seeing, x0, c * at.stride, to + n, vectors);
          });
        }
      });
    });
  };

  // The keys of this band are seen by queries up to a radius above and below it. Whole groups of them are computed.
  const int64_t first = band.first > radius ? (band.first - radius) / GROUP * GROUP : 0;
  const int64_t below = round_up(band.last + radius, GROUP), last = below < at.height ? below : at.height;
  int64_t next = first > radius ? first - radius : 0;  // row of keys to bring in
  int64_t done = band.first;                           // rows of keys whose gradients are written
  for (int64_t y = first; y < last; y += GROUP) {
    const int64_t rows = last - y < GROUP ? last - y : GROUP;
    const int64_t end = y + rows + radius < at.height ? y + rows + radius : at.height;
    if (has_key) pack(p.key, p, at, band, next, end - next, T(1), keys);
    pack(p.value, p, at, band, next, end - next, T(1), values);
    pack(p.query, p, at, band, y, rows, T(p.scale * LOG2_E), queries);
    pack(p.grad, p, at, band, y, rows, T(1), grads);
    for (; next < end; ++next) {
      if (has_key) clear(key_grads.row(next), at.map_row());
      clear(value_grads.row(next), at.map_row());
    }
    const Seen seen(at, y, rows);
    if (has_key) seen.point(keys, key_rows);
    seen.point(values, value_rows);
    for (int64_t g = 0; g < rows; ++g) {
      const T* lse = logsumexp_row<T>(p, band, y + g);
      for (int64_t x = 0; x < at.width; ++x) shift[g * at.stride + x] = lse[x * p.dilation];
    }
    const Span<T> window_keys = weighted(at, pull, key_rows, seen);
    T* to[GROUP];
    out.point(y, rows, at.margin, to);

    as_group(rows, [&](auto group) {
      constexpr int G = group.value;
      by_tiles(at, [&](int64_t x0, int64_t vectors) {
        const T *here[G], *grad_here[G];
        queries.point(y, G, at.margin + x0, here);
        grads.point(y, G, at.margin + x0, grad_here);
        for (int g = 0; g < G; ++g)
          for (int64_t i = 0; i < k; ++i)
            for (int64_t v = 0; !seen.has(g + i) && v < vectors; ++v)
              clear(reinterpret_cast<T*>(pull.logits + (v * GROUP + g) * window + i * k), k * L);
        tile_logits<G>(p, at, tables, x0, vectors, here, key_rows, seen, tile);
        window_dots<G, T>(at, grad_here, value_rows, seen, at.margin + x0 - radius, pull.bias, pull.logits,
                          nullptr, vectors);
        for (int64_t v = 0; v < vectors; ++v)
          for (int g = 0; g < G; ++g) {
            const int64_t x = x0 + v * L, n = v * GROUP + g;
            const int64_t place = g * at.pair_row() + at.margin + x - radius;
            V* cols = tile.bias + n * 2 * k;
            pull_weights<T>(k, at.stride, load(shift + g * at.stride + x), tile.logits + n * window,
                            pull.logits + n * window, cols, weights + place, pulls + place,
                            by_row + g * k * at.stride + x, by_col + g * k * at.stride + x);
            if (!tables.row)
              for (int64_t j = 0; j < k; ++j) cols[j] = V{};
          }
        by_channels(at.depth, [&](auto count, int64_t c) {
          constexpr int N = count.value;
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t x = x0 + v * L;
            const Places<G, T> places(to, x + c * at.stride, at.stride);
            const int64_t stride = at.stride;
            const auto put = [=](V(&sum)[G][N]) __attribute__((always_inline)) {
              const auto add = [&](int first, int end) __attribute__((always_inline)) {
                const int64_t channel = c + first;
                if (channel < half) add_table(tables.row + channel * k, by_row + x, k, stride, first, end, sum);
                else add_table(tables.col + (channel - half) * k, by_col + x, k, stride, first, end, sum);
              };
              if (tables.row && (c + N <= half || c >= half)) {
                add(0, N);
              } else if (tables.row) {  // rows have some of these channels, and columns the rest
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) add(n, n + 1);
              }
              places.write(sum);
            };
            if (has_key) {
              window_sums<G, N>(window_keys, at.margin + x - radius + c * at.stride, v * GROUP * window * L, put);
            } else {
              V sum[G][N]{};
              put(sum);
            }
          }
        });
      });
    });
    for (int64_t g = rows; g < GROUP; ++g) {  // rows below the map spread nothing
      clear(queries.row(y + g), at.map_row());
      clear(grads.row(y + g), at.map_row());
      clear(weights + g * at.pair_row(), at.pair_row());
      clear(pulls + g * at.pair_row(), at.pair_row());
    }
    if (has_key) spread(y, pulls, queries, key_grads);
    spread(y, weights, grads, value_grads);
    // Rows above and below the band are their own bands' to write and to count.
    const int64_t own_first = y > band.first ? y : band.first;
    const int64_t own_last = y + rows < band.last ? y + rows : band.last;
    if (own_first < own_last)
      unpack(p.grad_query, p, at, band, own_first, own_last - own_first, T(p.scale), out);
    for (int64_t row = own_first; tables.row && row < own_last; ++row) {
      const int64_t g = row - y;
      const T* q = queries.row(row) + at.margin;
      for (int64_t c = 0; c < at.depth; ++c)
        in_pieces<9>(k, [&](auto count, int64_t n) {
          row_dots<count.value>(q + c * at.stride,
                                (c < half ? by_row : by_col) + (g * k + n) * at.stride, at.padded,
                                at.stride, table_sums + c * k + n);
        });
      if ((row + 1) % TABLE_ROWS == 0 || row + 1 == at.height) {
        T* sums = table_grads<T>(p, band, row / TABLE_ROWS);
        for (int64_t n = 0; n < at.depth * k; ++n) {
          sums[n] += sum_lanes<T>(table_sums[n]) * T(LN_2);
          table_sums[n] = V{};
        }
      }
    }
    // Rows that no query further down sees, or all where this was the last.
    int64_t ready = y + rows == last ? band.last : y + rows - radius;
    if (ready > band.last) ready = band.last;
    if (ready <= done) continue;
    if (has_key) unpack(p.grad_key, p, at, band, done, ready - done, T(LN_2), key_grads);
    unpack(p.grad_value, p, at, band, done, ready - done, T(1), value_grads);
    done = ready;
  }
}

template <typename T>
int64_t scratch_elements(const Problem& p, bool backward) {
  const Layout<T> at(p, 0, 0);
  const int64_t k = at.k, lanes = Vector<T>::lanes, span = span_of(k), tile = Logits<T>::elements(k);
  const int64_t spare = 32 * lanes;  // what rounding up may add
  if (!backward) return (2 * span + 2 * GROUP) * at.map_row() + tile + spare;
  return (4 * span + 3 * GROUP + 1) * at.map_row() + 2 * GROUP * at.pair_row() +
         (2 * k + 1) * GROUP * at.stride + 2 * tile + at.depth * k * lanes + spare;
}

int64_t scratch(const Problem& p, bool backward) {
  return p.type == Type::Double ? scratch_elements<double>(p, backward) * int64_t(sizeof(double))
                                : scratch_elements<float>(p, backward) * int64_t(sizeof(float));
}

void forward(const Problem& p, const Band& band, void* memory) {
  if (p.type == Type::Double) forward_band<double>(p, band, memory);
  else forward_band<float>(p, band, memory);
}

void backward(const Problem& p, const Band& band, void* memory) {
  if (p.type == Type::Double) backward_band<double>(p, band, memory);
  else backward_band<float>(p, band, memory);
}

}  // namespace
}  // namespace sasa
