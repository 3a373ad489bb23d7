// The forward and the backward of one band. README.md says how they work, and what each term means.
//
// One file for each CPU capability includes this one, and sets VECTOR_BYTES and VECTOR_REGISTERS. All is in an
// unnamed namespace: problem.h says why.
//
// All loops over pixels are over whole vectors. Lanes past the last pixel compute on zeros and are not stored.

#include "products.h"

namespace sasa {
namespace {

// Rows of K and V in the windows of QUERY_ROWS query rows.
inline int64_t kv_rows(int64_t k) { return k + QUERY_ROWS - 1; }

template <typename T>
inline T* lse_row(const Problem& p, const Band& band, int64_t y) {
  return static_cast<T*>(p.lse) +
         ((band.image * p.heads + band.head) * p.height + band.phase_row + y * p.dilation) * p.width +
         band.phase_col;
}

// The band's partial of the gradient of the tables, for one block.
template <typename T>
inline T* dtables_of(const Problem& p, const Band& band, int64_t block) {
  const int64_t partial = (band.image * p.heads + band.head) * table_partials(p) + band.partial;
  return static_cast<T*>(p.dtables) + (partial * blocks(p) + block) * p.depth * p.kernel_size;
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

// ---- Logits of a tile. ----

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
    const Vec<T>* own = bias + first * 2 * k;
    dispatch_rows(last - first + 1, [&](auto count) {
      if constexpr (count.value > R) return;
      // A single query row has registers left. With more sums, fewer of the products wait for the one before.
      constexpr int most = count.value == 1 ? MAX_NEIGHBOURS_OF_ONE_ROW : MAX_NEIGHBOURS;
      by_neighbours<most>(k, [&](auto neighbours, int64_t j) {
        const Bias<T> start{own + u - first, own + k + j, 2 * k};
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
      V* own = logits.data + (v * QUERY_ROWS + r) * area;
      const V* bias = logits.bias + (v * QUERY_ROWS + r) * 2 * k;
      for (int64_t i = 0; i < k; ++i) {
        const bool outside = !range.has(r + i);
        if (!p.key.data || outside)
          for (int64_t j = 0; j < k; ++j)
            own[i * k + j] = p.mask && outside ? splat<T>(-__builtin_inf()) : bias[i] + bias[k + j];
        if (p.mask) mask_sides(layout, x0 + v * L, own + i * k);
      }
      logits.max[v * QUERY_ROWS + r] = max_of<T>(own, area);
    }
}

// How often window_sums is called for a row, or a little less: the prefetches are divided among these calls.
template <typename T>
inline int64_t window_sums_per_row(const Layout<T>& layout) {
  return layout.padded_width / Vector<T>::lanes * ((layout.depth + MAX_CHANNELS - 1) / MAX_CHANNELS);
}

// ---- Forward. ----

// The softmax of one vector's windows, not yet divided by the sum: x = 2^(x - max). Returns the sum.
template <typename T>
__attribute__((noinline)) Vec<T> softmax_forward(Vec<T>* x, int64_t n, Vec<T> max) {
  Vec<T> sum = Vec<T>{};
#pragma GCC unroll 4
  for (int64_t m = 0; m < n; ++m) {
    x[m] = exp2_vec(x[m] - max);
    sum += x[m];
  }
  return sum;
}

template <typename T>
void forward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> layout(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = layout.k, radius = layout.radius, area = k * k;
  const int64_t ring_rows = kv_rows(k), row_size = layout.row_size();
  Ring<T> keys{has_key ? scratch.allocate(ring_rows * row_size) : nullptr, ring_rows, row_size};
  Ring<T> values{scratch.allocate(ring_rows * row_size), ring_rows, row_size};
  const Ring<T> queries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> outputs{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const TileLogits<T> logits(scratch, k);
  // Margins stay zero from band to band, unless the next phase has another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head);
  const T* key_rows[MAX_KV_ROWS];
  const T* value_rows[MAX_KV_ROWS];

  int64_t next = band.first > radius ? band.first - radius : 0;  // row of K and V to pack
  for (int64_t y = band.first; y < band.last; y += QUERY_ROWS) {
    const int64_t rows = band.last - y < QUERY_ROWS ? band.last - y : QUERY_ROWS;
    const int64_t end = y + rows + radius < layout.height ? y + rows + radius : layout.height;
    if (has_key) pack(p.key, p, layout, band, next, end - next, T(1), keys);
    pack(p.value, p, layout, band, next, end - next, T(1), values);
    pack(p.query, p, layout, band, y, rows, T(p.scale * LOG2_E), queries);
    next = end;
    const RowRange range(layout, y, rows);
    if (has_key) range.row_pointers(keys, key_rows);
    range.row_pointers(values, value_rows);
    // Prefetch what the next query rows will read, and where these will write.
    Prefetcher prefetcher(p, band);
    const int64_t next_rows = band.last - y - rows < QUERY_ROWS ? band.last - y - rows : QUERY_ROWS;
    const int64_t next_kv_rows = layout.height - next < next_rows ? layout.height - next : next_rows;
    prefetcher.add(p.key, next, next_kv_rows);
    prefetcher.add(p.value, next, next_kv_rows);
    prefetcher.add(p.query, y + rows, next_rows);
    prefetcher.add(p.output, y, rows);
    prefetcher.schedule(window_sums_per_row(layout), range.end - range.begin);
    const WeightedRows<T> weighted_values = weighted_rows(layout, logits, value_rows);
    T* output_rows[QUERY_ROWS];
    outputs.row_pointers(y, rows, layout.margin, output_rows);

    dispatch_rows(rows, [&](auto row_count) {
      constexpr int R = row_count.value;
      by_tiles(layout, [&](int64_t x0, int64_t vectors) {
        const T* q[R];
        queries.row_pointers(y, R, layout.margin + x0, q);
        compute_logits<R>(p, layout, tables, x0, vectors, q, key_rows, range, logits);
        for (int64_t v = 0; v < vectors; ++v)
          for (int r = 0; r < R; ++r) {
            const V max = logits.max[v * QUERY_ROWS + r];
            const V sum = softmax_forward<T>(logits.data + (v * QUERY_ROWS + r) * area, area, max);
            logits.max[v * QUERY_ROWS + r] = T(1) / sum;  // in the memory of the maximum
            const V lse = max + log_vec(sum) * T(LOG2_E);
            const int64_t x = x0 + v * L;
            T* to = lse_row<T>(p, band, y + r) + x * p.dilation;
            if (p.dilation == 1 && x + L <= layout.width)
              store(to, lse);
            else
              for (int n = 0; n < L && x + n < layout.width; ++n) to[n * p.dilation] = lse[n];
          }
        by_channels(layout.depth, [&](auto count, int64_t c) {
          constexpr int N = count.value;
          for (int64_t v = 0; v < vectors; ++v) {
            const RowWriter<R, T> writer(output_rows, x0 + v * L + c * layout.stride, layout.stride);
            const V* inverse_sum = logits.max + v * QUERY_ROWS;
            const auto finish = [=](V(&sum)[R][N]) __attribute__((always_inline)) {
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) sum[r][n] *= inverse_sum[r];
              writer.write(sum);
            };
            window_sums<R, N>(weighted_values, range, layout.margin + x0 + v * L - radius + c * layout.stride,
                              v * QUERY_ROWS * area * L, finish, &prefetcher.next());
          }
        });
      });
    });
    unpack(p.output, p, layout, band, y, rows, T(1), outputs);
  }
}

// ---- Backward. ----

// The backward of the softmax, for one vector of pixels and one query row:
//   P = 2^(S - lse)     delta = sum of P * dP     dS = P * dP - delta * P
// P takes the memory of S, and dS that of dP. For scatter_add both are also stored at their neighbours' pixels.
// dbias_row and dbias_col are the sums of dS over each row and column of the window.
// Arguments are copies. The stores may alias what a lambda captures by reference, which would be loaded again.
template <typename T>
__attribute__((noinline)) void softmax_backward(int64_t k, int64_t stride, Vec<T> lse, Vec<T>* logits,
                                                Vec<T>* dlogits, Vec<T>* col_sums, T* weight_row,
                                                T* dlogit_row, T* dbias_row, T* dbias_col) {
  Vec<T> delta = Vec<T>{};
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      logits[n] = exp2_vec(logits[n] - lse);
      store(weight_row + n * stride + j, logits[n]);
      dlogits[n] *= logits[n];
      delta += dlogits[n];
    }
  for (int64_t j = 0; j < k; ++j) col_sums[j] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<T> row_sum = Vec<T>{};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      dlogits[n] -= delta * logits[n];
      store(dlogit_row + n * stride + j, dlogits[n]);
      row_sum += dlogits[n];
      col_sums[j] += dlogits[n];
    }
    store(dbias_row + i * stride, row_sum);
  }
  for (int64_t j = 0; j < k; ++j) store(dbias_col + j * stride, col_sums[j]);
}

template <typename T>
void backward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> layout(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = layout.k, radius = layout.radius, half = layout.depth / 2, area = k * k;
  const int64_t ring_rows = kv_rows(k), row_size = layout.row_size();
  Ring<T> keys{has_key ? scratch.allocate(ring_rows * row_size) : nullptr, ring_rows, row_size};
  Ring<T> values{scratch.allocate(ring_rows * row_size), ring_rows, row_size};
  Ring<T> dkeys{has_key ? scratch.allocate(ring_rows * row_size) : nullptr, ring_rows, row_size};
  Ring<T> dvalues{scratch.allocate(ring_rows * row_size), ring_rows, row_size};
  const Ring<T> queries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> doutputs{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> dqueries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  T* discarded = scratch.allocate(row_size);  // takes the gradients of rows of other bands
  // P and dS of the query rows, [query row][neighbour][pixel], each at its neighbour's pixel.
  T* weight_rows = scratch.allocate(QUERY_ROWS * layout.window_row_size());
  T* dlogit_rows = scratch.allocate(QUERY_ROWS * layout.window_row_size());
  T* dbias_row = scratch.allocate(QUERY_ROWS * k * layout.stride);
  T* dbias_col = scratch.allocate(QUERY_ROWS * k * layout.stride);
  T* lse = scratch.allocate(QUERY_ROWS * layout.stride);
  const TileLogits<T> logits(scratch, k), dlogits(scratch, k);
  V* table_sums = reinterpret_cast<V*>(scratch.allocate(layout.depth * k * L));  // [channel][neighbour]
  // Margins stay zero from band to band, unless the next phase has another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  clear(reinterpret_cast<T*>(table_sums), layout.depth * k * L);
  const Tables<T> tables = tables_of<T>(p, band.head);

  const T* key_rows[MAX_KV_ROWS];
  const T* value_rows[MAX_KV_ROWS];

  // Add to dK or dV what the query rows from y on give: dS^T Q or P^T dO.
  auto scatter_query_rows = [&](int64_t y, const T* window_rows, const Ring<T>& sources,
                                const Ring<T>& targets) {
    const T* rows[QUERY_ROWS];
    sources.row_pointers(y, QUERY_ROWS, layout.margin + radius, rows);
    const int64_t top = y - radius, row_step = k * layout.stride;  // from a row of the windows to the next
    T* to[MAX_KV_ROWS];
    for (int64_t n = 0; n < round_up(ring_rows, QUERY_ROWS); ++n) {
      const bool own = n < ring_rows && top + n >= band.first && top + n < band.last;
      to[n] = layout.margin + (own ? targets.row(top + n) : discarded);
    }
    by_tiles(layout, [&](int64_t x0, int64_t vectors) {
      by_channels(layout.depth, [&](auto count, int64_t c) {
        for (int64_t n = 0; n < ring_rows; n += QUERY_ROWS) {
          if (top + n + QUERY_ROWS <= band.first || top + n >= band.last) continue;
          const WeightedRows<T> weighted{rows, k, layout.stride, window_rows + layout.margin + n * row_step,
                                         row_step, layout.window_row_size() - row_step, layout.stride};
          dispatch_row_offsets(n, k, [&](auto low, auto high) {
            scatter_add<low.value, high.value, count.value>(weighted, x0, c * layout.stride, to + n, vectors);
          });
        }
      });
    });
  };

  // Queries up to a radius above and below the band see its keys. They are computed as well, in whole threes.
  const int64_t first = band.first > radius ? (band.first - radius) / QUERY_ROWS * QUERY_ROWS : 0;
  const int64_t below = round_up(band.last + radius, QUERY_ROWS);
  const int64_t last = below < layout.height ? below : layout.height;
  int64_t next = first > radius ? first - radius : 0;  // row of K and V to pack
  int64_t written = band.first;                        // rows of dK and dV before it are in the maps
  for (int64_t y = first; y < last; y += QUERY_ROWS) {
    const int64_t rows = last - y < QUERY_ROWS ? last - y : QUERY_ROWS;
    const int64_t end = y + rows + radius < layout.height ? y + rows + radius : layout.height;
    if (has_key) pack(p.key, p, layout, band, next, end - next, T(1), keys);
    pack(p.value, p, layout, band, next, end - next, T(1), values);
    pack(p.query, p, layout, band, y, rows, T(p.scale * LOG2_E), queries);
    pack(p.doutput, p, layout, band, y, rows, T(1), doutputs);
    for (; next < end; ++next) {
      if (has_key) clear(dkeys.row(next), row_size);
      clear(dvalues.row(next), row_size);
    }
    const RowRange range(layout, y, rows);
    if (has_key) range.row_pointers(keys, key_rows);
    range.row_pointers(values, value_rows);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = lse_row<T>(p, band, y + r);
      for (int64_t x = 0; x < layout.width; ++x) lse[r * layout.stride + x] = from[x * p.dilation];
    }
    const WeightedRows<T> weighted_keys = weighted_rows(layout, dlogits, key_rows);
    T* dquery_rows[QUERY_ROWS];
    dqueries.row_pointers(y, rows, layout.margin, dquery_rows);

    dispatch_rows(rows, [&](auto row_count) {
      constexpr int R = row_count.value;
      by_tiles(layout, [&](int64_t x0, int64_t vectors) {
        const T *q[R], *dout[R];
        queries.row_pointers(y, R, layout.margin + x0, q);
        doutputs.row_pointers(y, R, layout.margin + x0, dout);
        // dP is zero in rows out of the map, where V is zero.
        for (int r = 0; r < R; ++r)
          for (int64_t i = 0; i < k; ++i)
            for (int64_t v = 0; !range.has(r + i) && v < vectors; ++v)
              clear(reinterpret_cast<T*>(dlogits.data + (v * QUERY_ROWS + r) * area + i * k), k * L);
        compute_logits<R>(p, layout, tables, x0, vectors, q, key_rows, range, logits);
        // The bias of dlogits is never written, and so zero.
        window_dots<R, T>(layout, dout, value_rows, range, layout.margin + x0 - radius, dlogits.bias,
                          dlogits.data, nullptr, vectors);
        for (int64_t v = 0; v < vectors; ++v)
          for (int r = 0; r < R; ++r) {
            const int64_t x = x0 + v * L, n = v * QUERY_ROWS + r;
            const int64_t offset = r * layout.window_row_size() + layout.margin + x - radius;
            V* col_sums = logits.bias + n * 2 * k;  // the bias has been added, so that its memory is free
            softmax_backward<T>(k, layout.stride, load(lse + r * layout.stride + x), logits.data + n * area,
                                dlogits.data + n * area, col_sums, weight_rows + offset, dlogit_rows + offset,
                                dbias_row + r * k * layout.stride + x, dbias_col + r * k * layout.stride + x);
            if (!tables.row)  // nothing writes the bias, and it must be zero
              for (int64_t j = 0; j < k; ++j) col_sums[j] = V{};
          }
        by_channels(layout.depth, [&](auto count, int64_t c) {
          constexpr int N = count.value;
          for (int64_t v = 0; v < vectors; ++v) {
            const int64_t x = x0 + v * L;
            const RowWriter<R, T> writer(dquery_rows, x + c * layout.stride, layout.stride);
            const int64_t stride = layout.stride;
            const auto finish = [=](V(&dq)[R][N]) __attribute__((always_inline)) {
              const auto add = [&](int first, int end) __attribute__((always_inline)) {
                const int64_t channel = c + first;
                if (channel < half)
                  relative_bias_dquery(tables.row + channel * k, dbias_row + x, k, stride, first, end, dq);
                else
                  relative_bias_dquery(tables.col + (channel - half) * k, dbias_col + x, k, stride, first, end,
                                       dq);
              };
              if (tables.row && (c + N <= half || c >= half)) {
                add(0, N);
              } else if (tables.row) {  // some of these channels are the row table's, some the column's
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) add(n, n + 1);
              }
              writer.write(dq);
            };
            if (has_key) {
              window_sums<R, N>(weighted_keys, range, layout.margin + x - radius + c * layout.stride,
                                v * QUERY_ROWS * area * L, finish);
            } else {
              V dq[R][N]{};
              finish(dq);
            }
          }
        });
      });
    });
    for (int64_t r = rows; r < QUERY_ROWS; ++r) {  // query rows below the map add nothing
      clear(doutputs.row(y + r), row_size);
      clear(weight_rows + r * layout.window_row_size(), layout.window_row_size());
      if (!has_key) continue;
      clear(queries.row(y + r), row_size);
      clear(dlogit_rows + r * layout.window_row_size(), layout.window_row_size());
    }
    if (has_key) scatter_query_rows(y, dlogit_rows, queries, dkeys);
    scatter_query_rows(y, weight_rows, doutputs, dvalues);
    // Other bands write the query rows above and below this one, and count them for the tables.
    const int64_t own_first = y > band.first ? y : band.first;
    const int64_t own_last = y + rows < band.last ? y + rows : band.last;
    if (own_first < own_last)
      unpack(p.dquery, p, layout, band, own_first, own_last - own_first, T(p.scale), dqueries);
    for (int64_t row = own_first; tables.row && row < own_last; ++row) {
      const int64_t r = row - y;
      const T* q = queries.row(row) + layout.margin;
      for (int64_t c = 0; c < layout.depth; ++c)
        by_neighbours<MAX_NEIGHBOURS_OF_ONE_ROW>(k, [&](auto count, int64_t j) {
          relative_bias_dtable<count.value>(q + c * layout.stride,
                                            (c < half ? dbias_row : dbias_col) + (r * k + j) * layout.stride,
                                            layout.padded_width, layout.stride, table_sums + c * k + j);
        });
      if ((row + 1) % BLOCK_ROWS == 0 || row + 1 == layout.height) {  // the block is complete
        T* partial = dtables_of<T>(p, band, row / BLOCK_ROWS);
        for (int64_t n = 0; n < layout.depth * k; ++n) {
          partial[n] += sum_lanes<T>(table_sums[n]) * T(LN_2);
          table_sums[n] = V{};
        }
      }
    }
    // Write the rows of dK and dV that no later query row sees; after the last ones, all.
    int64_t complete = y + rows == last ? band.last : y + rows - radius;
    if (complete > band.last) complete = band.last;
    if (complete <= written) continue;
    if (has_key) unpack(p.dkey, p, layout, band, written, complete - written, T(LN_2), dkeys);
    unpack(p.dvalue, p, layout, band, written, complete - written, T(1), dvalues);
    written = complete;
  }
}

// ---- What kernels_*.cpp hand out. ----

template <typename T>
int64_t scratch_elements(const Problem& p, bool backward) {
  const Layout<T> layout(p, 0, 0);
  const int64_t k = layout.k, lanes = Vector<T>::lanes, ring_rows = kv_rows(k);
  const int64_t tile = TileLogits<T>::elements(k);
  const int64_t rounding = 32 * lanes;  // at least what Scratch::allocate adds
  if (!backward) return (2 * ring_rows + 2 * QUERY_ROWS) * layout.row_size() + tile + rounding;
  return (4 * ring_rows + 3 * QUERY_ROWS + 1) * layout.row_size() + 2 * QUERY_ROWS * layout.window_row_size() +
         (2 * k + 1) * QUERY_ROWS * layout.stride + 2 * tile + layout.depth * k * lanes + rounding;
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
