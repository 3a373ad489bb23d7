// The backward of one band: dQ, dK, dV and what it adds to the gradient of the tables. The softmax is in
// softmax_backward.
#pragma once
#include "logits.h"

namespace sasa {
namespace {

// The sum over one block of the gradient of the tables, in the band's partial.
template <typename T>
inline T* dtables_of(const Problem& p, const Band& band, int64_t block) {
  const int64_t partial = (band.image * p.heads + band.head) * table_partials(p) + band.partial;
  return static_cast<T*>(p.dtables) + (partial * blocks(p) + block) * p.depth * p.kernel_size;
}

// The backward of the softmax, for one vector of pixels and one query row:
//   P = 2^(S - lse)     delta = sum of P * dP     dS = P * dP - delta * P
// P takes the memory of S, and dS that of dP. For scatter_add both are also stored at their neighbours' pixels.
// dbias_row and dbias_col are the sums of dS over each row and column of the window.
// Arguments are copies. The stores may alias what a lambda captures by reference, which would be loaded again.
template <typename T>
__attribute__((noinline)) void softmax_backward(int64_t k, int64_t stride, const int64_t* shifts, Vec<T> lse,
                                                Vec<T>* logits, Vec<T>* dlogits, Vec<T>* col_sums, T* weight_row,
                                                T* dlogit_row, T* dbias_row, T* dbias_col) {
  Vec<T> delta = Vec<T>{};
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      logits[n] = exp2_vec(logits[n] - lse);
      store(weight_row + n * stride + shifts[j], logits[n]);
      dlogits[n] *= logits[n];
      delta += dlogits[n];
    }
  for (int64_t j = 0; j < k; ++j) col_sums[j] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<T> row_sum = Vec<T>{};
    for (int64_t j = 0; j < k; ++j) {
      const int64_t n = i * k + j;
      dlogits[n] -= delta * logits[n];
      store(dlogit_row + n * stride + shifts[j], dlogits[n]);
      row_sum += dlogits[n];
      col_sums[j] += dlogits[n];
    }
    store(dbias_row + i * stride, row_sum);
  }
  for (int64_t j = 0; j < k; ++j) store(dbias_col + j * stride, col_sums[j]);
}

// Scratch memory that backward_band allocates, in elements, but for what Scratch rounds up.
template <typename T>
int64_t backward_elements(const Layout<T>& layout) {
  const int64_t k = layout.k;
  return (4 * layout.ring_rows() + 1) * layout.kv_row_size() + 3 * QUERY_ROWS * layout.row_size() +
         2 * QUERY_ROWS * layout.window_row_size() +
         (2 * k + 1) * QUERY_ROWS * layout.stride + 2 * TileLogits<T>::elements(k) +
         layout.depth * k * (Vector<T>::lanes + 1);
}

template <typename T>
void backward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> layout(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const Neighbours neighbours(layout);
  const int64_t k = layout.k, kv_stride = layout.kv_stride, half = layout.depth / 2, area = k * k;
  const int64_t ring_rows = layout.ring_rows(), row_size = layout.row_size(), kv_row_size = layout.kv_row_size();
  Ring<T> keys{has_key ? scratch.allocate(ring_rows * kv_row_size) : nullptr, ring_rows, kv_row_size};
  Ring<T> values{scratch.allocate(ring_rows * kv_row_size), ring_rows, kv_row_size};
  Ring<T> dkeys{has_key ? scratch.allocate(ring_rows * kv_row_size) : nullptr, ring_rows, kv_row_size};
  Ring<T> dvalues{scratch.allocate(ring_rows * kv_row_size), ring_rows, kv_row_size};
  const Ring<T> queries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> doutputs{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> dqueries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  T* discarded = scratch.allocate(kv_row_size);  // takes the gradients of rows of other bands
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
  const Tables<T> tables = tables_of<T>(p, band.head, neighbours, scratch);

  const T* key_rows[MAX_KV_ROWS];
  const T* value_rows[MAX_KV_ROWS];

  // The band's own rows of K and V: each phase of them is cut as that of the queries is.
  const int64_t kv_first = band.first * kv_stride;
  const int64_t kv_last = band.last < layout.queries.height ? band.last * kv_stride : layout.keys.height;

  // Add to dK or dV what the query rows from y on give: dS^T Q or P^T dO.
  auto scatter_query_rows = [&](int64_t y, const T* window_rows, const Ring<T>& sources,
                                const Ring<T>& targets) {
    const T* rows[QUERY_ROWS];
    sources.row_pointers(y, QUERY_ROWS, layout.margin, rows);
    const int64_t top = layout.window_top(y);
    const int64_t row_step = k * layout.stride, target_step = kv_stride * row_step;  // between rows of the windows
    // Three rows of K or V a stride apart, `above` of their kind below the top of query row 0's window.
    struct Targets {
      int64_t above, k;  // rows of their kind in a window
      const T* weights;
      T* rows[QUERY_ROWS];
    } targets_of[MAX_KV_ROWS / QUERY_ROWS];
    int64_t threes = 0;
    for (int64_t i = 0; i < k && i < kv_stride; ++i) {
      const int64_t kind_k = (k - i + kv_stride - 1) / kv_stride;
      for (int64_t n = 0; n < kind_k + QUERY_ROWS - 1; n += QUERY_ROWS) {
        Targets& three = targets_of[threes];
        three.above = n, three.k = kind_k;
        three.weights = window_rows + layout.margin + i * row_step + n * target_step;
        bool any = false;
        for (int64_t t = 0; t < QUERY_ROWS; ++t) {
          const int64_t row = top + i + (n + t) * kv_stride;
          const bool own = n + t < kind_k + QUERY_ROWS - 1 && row >= kv_first && row < kv_last;
          three.rows[t] = layout.margin + (own ? targets.row(row) : discarded);
          any |= own;
        }
        threes += any;
      }
    }
    by_tiles(layout, [&](int64_t x0, int64_t vectors) {
      by_channels(layout.depth, [&](auto count, int64_t c) {
        for (int64_t m = 0; m < threes; ++m)
          for (int64_t run = 0; run < neighbours.runs; ++run) {
            const Targets& three = targets_of[m];
            const int64_t j = neighbours.first[run];
            const WeightedRows<T> weighted{rows, neighbours.count(run), layout.stride,
                                           three.weights + j * layout.stride, target_step,
                                           layout.window_row_size() - target_step, layout.stride};
            dispatch_row_offsets(three.above, three.k, [&](auto low, auto high) {
              scatter_add<low.value, high.value, count.value>(weighted, x0, c * layout.stride - neighbours.shifts[j],
                                                              three.rows, neighbours.columns[run], vectors);
            });
          }
      });
    });
  };

  // Other queries see the band's keys, too. They are computed as well, in whole threes.
  const int64_t first = layout.first_to_see(kv_first) / QUERY_ROWS * QUERY_ROWS;
  const int64_t below = round_up(layout.first_below(kv_last), QUERY_ROWS);
  const int64_t last = below < layout.queries.height ? below : layout.queries.height;
  const int64_t top = layout.window_top(first);
  int64_t next = top > 0 ? top : 0;                       // row of K and V to pack
  int64_t written = kv_first > next ? kv_first : next;    // rows of dK and dV before it are in the maps
  for (int64_t y = first; y < last; y += QUERY_ROWS) {
    const int64_t rows = last - y < QUERY_ROWS ? last - y : QUERY_ROWS;
    const RowRange range(layout, y, rows);
    const int64_t end = range.top + range.end;
    if (has_key) pack(p.key, layout.keys, p, layout, band, next, end - next, T(1), keys);
    pack(p.value, layout.keys, p, layout, band, next, end - next, T(1), values);
    pack(p.query, layout.queries, p, layout, band, y, rows, T(p.scale * LOG2_E), queries);
    pack(p.doutput, layout.queries, p, layout, band, y, rows, T(1), doutputs);
    for (; next < end; ++next) {
      if (has_key) clear(dkeys.row(next), kv_row_size);
      clear(dvalues.row(next), kv_row_size);
    }

    if (has_key) range.row_pointers(keys, key_rows);
    range.row_pointers(values, value_rows);
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = lse_row<T>(p, band, y + r);
      for (int64_t x = 0; x < layout.queries.width; ++x) lse[r * layout.stride + x] = from[x * p.dilation];
    }
    const KvRows<T> weighted_keys = weighted_rows(layout, neighbours, dlogits, key_rows);
    T* dquery_rows[QUERY_ROWS];
    dqueries.row_pointers(y, rows, layout.margin, dquery_rows);

    dispatch_rows(rows, [&](auto row_count) {
      constexpr int R = row_count.value;
      by_tiles(layout, [&](int64_t x0, int64_t vectors) {
        const T *q[R], *doutput[R];
        queries.row_pointers(y, R, layout.margin + x0, q);
        doutputs.row_pointers(y, R, layout.margin + x0, doutput);
        // S = Q K^T + bias, as in the forward.
        compute_logits<R>(p, layout, neighbours, tables, x0, vectors, q, key_rows, range, logits);
        // dP = dO V^T. Out of the map V is zero, and so is dP. The bias of dlogits is never written, and zero.
        for (int r = 0; r < R; ++r)
          for (int64_t i = 0; i < k; ++i)
            for (int64_t v = 0; !range.has(r * kv_stride + i) && v < vectors; ++v)
              clear(reinterpret_cast<T*>(dlogits.data + (v * QUERY_ROWS + r) * area + i * k), k * L);
        window_dots<R, T>(layout, neighbours, doutput, value_rows, range, layout.margin + x0, dlogits.bias, dlogits.data,
                          nullptr, vectors);
        // P, dS, and dbias.
        for (int64_t v = 0; v < vectors; ++v)
          for (int r = 0; r < R; ++r) {
            const int64_t x = x0 + v * L, n = v * QUERY_ROWS + r;
            const int64_t offset = r * layout.window_row_size() + layout.margin + x;
            V* col_sums = logits.bias + n * 2 * k;  // the bias has been added, so that its memory is free
            softmax_backward<T>(k, layout.stride, neighbours.shifts, load(lse + r * layout.stride + x),
                                logits.data + n * area, dlogits.data + n * area, col_sums, weight_rows + offset,
                                dlogit_rows + offset, dbias_row + r * k * layout.stride + x,
                                dbias_col + r * k * layout.stride + x);
            if (!tables.row)  // no table: the bias is not computed again, and must be zero
              for (int64_t j = 0; j < k; ++j) col_sums[j] = V{};
          }
        // dQ = dS K + dbias times the tables.
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
              window_sums<R, N>(weighted_keys, range, layout.margin + x + c * layout.stride, v * QUERY_ROWS * area * L,
                                finish);
            } else {
              V dq[R][N]{};
              finish(dq);
            }
          }
        });
      });
    });

    // dK += dS^T Q, and dV += P^T dO. Query rows below the map add nothing.
    for (int64_t r = rows; r < QUERY_ROWS; ++r) {
      clear(doutputs.row(y + r), row_size);
      clear(weight_rows + r * layout.window_row_size(), layout.window_row_size());
      if (!has_key) continue;
      clear(queries.row(y + r), row_size);
      clear(dlogit_rows + r * layout.window_row_size(), layout.window_row_size());
    }
    if (has_key) scatter_query_rows(y, dlogit_rows, queries, dkeys);
    scatter_query_rows(y, weight_rows, doutputs, dvalues);

    // Write the band's own rows of dQ, and add them to the gradient of the tables. Others are other bands'.
    const int64_t own_first = y > band.first ? y : band.first;
    const int64_t own_last = y + rows < band.last ? y + rows : band.last;
    if (own_first < own_last)
      unpack(p.dquery, layout.queries, p, layout, band, own_first, own_last - own_first, T(p.scale), dqueries);
    for (int64_t row = own_first; tables.row && row < own_last; ++row) {
      const int64_t r = row - y;
      const T* q = queries.row(row) + layout.margin;
      for (int64_t c = 0; c < layout.depth; ++c)
        by_neighbours<MAX_NEIGHBOURS_OF_ONE_ROW>(k, [&](auto count, int64_t j) {
          relative_bias_dtable<count.value>(q + c * layout.stride,
                                            (c < half ? dbias_row : dbias_col) + (r * k + j) * layout.stride,
                                            layout.padded_width, layout.stride, table_sums + c * k + j);
        });
      if ((row + 1) % BLOCK_ROWS == 0 || row + 1 == layout.queries.height) {  // the block is complete
        T* block_sum = dtables_of<T>(p, band, row / BLOCK_ROWS);
        for (int64_t c = 0; c < layout.depth; ++c)
          for (int64_t j = 0; j < k; ++j) {
            V& sum = table_sums[c * k + j];
            block_sum[c * k + (c < half ? j : neighbours.order[j])] += sum_lanes<T>(sum) * T(LN_2);
            sum = V{};
          }
      }
    }

    // Write the rows of dK and dV that no later query row sees. After the last query rows, write all.
    int64_t complete = y + rows == last ? kv_last : layout.window_top(y + rows);
    if (complete > kv_last) complete = kv_last;
    if (complete > next) complete = next;
    if (complete <= written) continue;
    if (has_key) unpack(p.dkey, layout.keys, p, layout, band, written, complete - written, T(LN_2), dkeys);
    unpack(p.dvalue, layout.keys, p, layout, band, written, complete - written, T(1), dvalues);
    written = complete;
  }
}

}  // namespace
}  // namespace sasa
