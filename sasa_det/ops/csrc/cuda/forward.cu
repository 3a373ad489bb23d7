// O and lse. A warp has the whole window of its 16 queries in registers, so the softmax is that of the formula.
#include "tile.cuh"

namespace {
// A row of the ring: the keys, if there are any, and the values.
constexpr int VALUES = HAS_KEY ? MAP_ROW : 0, RING_ROW = round_up(VALUES + MAP_ROW, 128);
constexpr int STRIPS_AT = RING_ROWS * RING_ROW, TABLES_AT = STRIPS_AT + WARPS * STRIPS;
constexpr int BUFFERS_AT = TABLES_AT + TABLE_BYTES;
static_assert(BUFFERS_AT + WARPS * BUFFER == SHARED_BYTES, "the host reckons with other shared memory");
// Two ones, as a column of the product of the weights.
constexpr uint32_t ONES = BF16 ? 0x3f803f80 : 0x3c003c00;
}  // namespace

KERNEL(forward)(const Arguments p) {
  const Thread thread;
  const Piece piece(p);
  if (piece.first >= piece.last) return;
  const uint32_t ring = shared_base(), tables = ring + TABLES_AT;
  const Strips strips(ring + STRIPS_AT + thread.warp * STRIPS, thread);
  const Writer writer(ring + BUFFERS_AT + thread.warp * BUFFER, thread);
  store_tables(tables, p, piece.head, thread);

  const Plane<uint16_t> query = plane_of(p.query, piece), key = plane_of(p.key, piece), output = plane_of(p.output, piece);
  Plane<uint16_t> value = key;
  value.data = plane_of(p.value, piece).data;
  const Plane<float> lse = plane_of(p.lse, p, piece);
  const Loader loader(thread, piece.left);
  auto load = [&](int chunk, int ring_row) {
    const uint32_t to = ring + (ring_row + loader.warp) * RING_ROW;
    const int row = loader.map_row(chunk);
    if (HAS_KEY) loader.copy(to, key, row, piece.height, piece.width);
    loader.copy(to + VALUES, value, row, piece.height, piece.width);
  };
  const uint32_t words = whole(words_at(thread.right + thread.g, thread.t));
  const Matrices matrices(thread.right, thread.lane, RING_ROW);
  for (int i = 0; i < CHUNKS; ++i) load(piece.first + i, 8 * i);

  int at = 0;   // row of the ring where the halo begins
  for (int chunk = piece.first; chunk < piece.last; ++chunk, at = next_chunk(at)) {
    const int row = 8 * chunk + thread.down + thread.row, col = piece.left + thread.right + thread.col;
    const bool there[2] = {row < piece.height && col < piece.width, row + HALF_ROWS < piece.height && col < piece.width};
    const uint16_t* const from = query.at(row, col);
    Rows queries;
    queries.load(from, HALF_ROWS * query.row_stride, there, thread.t);
    wait_for_copies();
    meet_block();
    queries.separate(p.zero);
    if (chunk + 1 < piece.last) load(chunk + CHUNKS, free_chunk(at));

    Terms terms;
    terms.compute(queries, tables, strips, thread, piece, row, col);
    const Halo<RING_ROW> halo(ring, at, thread.down);
    float s[PRODUCTS][4];
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) {
      terms.begin(s[n], n);
      if (HAS_KEY) {
        uint32_t keys[WORDS];
        load_words(keys, halo.row(row_of(n)) + words + part_of(n) * 8 * PIXEL, p.zero);
        multiply(s[n], queries, keys);
      }
    }

    float max[2] = {s[0][0], s[HALF_ROWS * HALO_PARTS][2]};
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (is_live(half, n)) max[half] = fmaxf(max[half], fmaxf(s[n][2 * half], s[n][2 * half + 1]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = fmaxf(max[half], exchange(max[half], 1));
      max[half] = fmaxf(max[half], exchange(max[half], 2)) * p.factor;
    }
    uint32_t weights[PRODUCTS][2];
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weights[n][half] = is_live(half, n) ? pack(exp2_of(fmaf(s[n][2 * half], p.factor, -max[half])),
                                                   exp2_of(fmaf(s[n][2 * half + 1], p.factor, -max[half])))
                                            : p.zero;

    float o[PIECES][4] = {}, sum[4] = {};
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      const uint32_t pair[4] = {weights[n][0], weights[n][1], weights[n + 1][0], weights[n + 1][1]};
      matrices.multiply_with(o, pair, halo.row(row_of(n)) + VALUES);
      multiply(sum, pair[0], pair[1], pair[2], pair[3], ONES, ONES);
    }
    uint16_t* const to = output.at(row, col);
    writer.store(o, reciprocal(sum[0]), reciprocal(sum[2]), to, HALF_ROWS * output.row_stride, there);
    if (thread.t == 0) {
      float* const sums = lse.at(row, col);
      if (there[0]) store_global(sums, as_bits(max[0] + log2_of(sum[0])));
      if (there[1]) store_global(sums + HALF_ROWS * lse.row_stride, as_bits(max[1] + log2_of(sum[2])));
    }
  }
}
