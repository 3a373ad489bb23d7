// The forward of one band: O and lse. The softmax is in softmax_forward.
#pragma once
#include "logits.h"

namespace sasa {
namespace {

// How often window_sums is called for a row, or a little less: the prefetches are divided among these calls.
template <typename T>
inline int64_t window_sums_per_row(const Layout<T>& layout) {
  return layout.padded_width / Vector<T>::lanes * ((layout.depth + MAX_CHANNELS - 1) / MAX_CHANNELS);
}

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

// Scratch memory that forward_band allocates, in elements, but for what Scratch rounds up.
template <typename T>
int64_t forward_elements(const Layout<T>& layout) {
  return 2 * layout.ring_rows() * layout.kv_row_size() + 2 * QUERY_ROWS * layout.row_size() +
         TileLogits<T>::elements(layout.k) + layout.depth * layout.k;
}

template <typename T>
void forward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> layout(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const Neighbours neighbours(layout);
  const int64_t k = layout.k, area = k * k, kv_height = layout.keys.height;
  const int64_t ring_rows = layout.ring_rows(), row_size = layout.row_size(), kv_row_size = layout.kv_row_size();
  Ring<T> keys{has_key ? scratch.allocate(ring_rows * kv_row_size) : nullptr, ring_rows, kv_row_size};
  Ring<T> values{scratch.allocate(ring_rows * kv_row_size), ring_rows, kv_row_size};
  const Ring<T> queries{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const Ring<T> outputs{scratch.allocate(QUERY_ROWS * row_size), QUERY_ROWS, row_size};
  const TileLogits<T> logits(scratch, k);
  // Margins stay zero from band to band, unless the next phase has another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head, neighbours, scratch);
  const T* key_rows[MAX_KV_ROWS];
  const T* value_rows[MAX_KV_ROWS];

  const int64_t top = layout.window_top(band.first);
  int64_t next = top > 0 ? top : 0;  // row of K and V to pack
  for (int64_t y = band.first; y < band.last; y += QUERY_ROWS) {
    const int64_t rows = band.last - y < QUERY_ROWS ? band.last - y : QUERY_ROWS;
    const RowRange range(layout, y, rows);
    const int64_t end = range.top + range.end;
    if (has_key) pack(p.key, layout.keys, p, layout, band, next, end - next, T(1), keys);
    pack(p.value, layout.keys, p, layout, band, next, end - next, T(1), values);
    pack(p.query, layout.queries, p, layout, band, y, rows, T(p.scale * LOG2_E), queries);
    next = end;
    if (has_key) range.row_pointers(keys, key_rows);
    range.row_pointers(values, value_rows);
    // Prefetch what the next query rows will read, and where these will write.
    Prefetcher prefetcher(p, band);
    const int64_t next_rows = band.last - y - rows < QUERY_ROWS ? band.last - y - rows : QUERY_ROWS;
    const int64_t kv_rows = next_rows * layout.kv_stride;
    const int64_t next_kv_rows = kv_height - next < kv_rows ? kv_height - next : kv_rows;
    prefetcher.add(p.key, layout.keys, next, next_kv_rows);
    prefetcher.add(p.value, layout.keys, next, next_kv_rows);
    prefetcher.add(p.query, layout.queries, y + rows, next_rows);
    prefetcher.add(p.output, layout.queries, y, rows);
    prefetcher.schedule(window_sums_per_row(layout), neighbours.runs * (range.end - range.begin));
    const KvRows<T> weighted_values = weighted_rows(layout, neighbours, logits, value_rows);
    T* output_rows[QUERY_ROWS];
    outputs.row_pointers(y, rows, layout.margin, output_rows);

    dispatch_rows(rows, [&](auto row_count) {
      constexpr int R = row_count.value;
      by_tiles(layout, [&](int64_t x0, int64_t vectors) {
        const T* q[R];
        queries.row_pointers(y, R, layout.margin + x0, q);
        // S = Q K^T + bias.
        compute_logits<R>(p, layout, neighbours, tables, x0, vectors, q, key_rows, range, logits);
        // P, not yet divided by its sum, and lse if it is wanted.
        for (int64_t v = 0; v < vectors; ++v)
          for (int r = 0; r < R; ++r) {
            const V max = logits.max[v * QUERY_ROWS + r];
            const V sum = softmax_forward<T>(logits.data + (v * QUERY_ROWS + r) * area, area, max);
            logits.max[v * QUERY_ROWS + r] = T(1) / sum;  // in the memory of the maximum
            if (!p.lse) continue;
            const V lse = max + log_vec(sum) * T(LOG2_E);
            const int64_t x = x0 + v * L;
            T* to = lse_row<T>(p, band, y + r) + x * p.dilation;
            const int64_t width = layout.queries.width;
            if (p.dilation == 1 && x + L <= width)
              store(to, lse);
            else
              for (int n = 0; n < L && x + n < width; ++n) to[n * p.dilation] = lse[n];
          }
        // O = P V / sum.
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
            window_sums<R, N>(weighted_values, range, layout.margin + x0 + v * L + c * layout.stride,
                              v * QUERY_ROWS * area * L, finish, &prefetcher.next());
          }
        });
      });
    });
    unpack(p.output, layout.queries, p, layout, band, y, rows, T(1), outputs);
  }
}

}  // namespace
}  // namespace sasa
