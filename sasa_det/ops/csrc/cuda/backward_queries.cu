// dQ, delta, and each block's part of the tables' gradients. Tiles and products are the forward's.
#include "tile.cuh"

namespace {
constexpr int VALUES = HAS_KEY ? MAP_ROW : 0, RING_ROW = round_up(VALUES + MAP_ROW, 128);
// S and dP of all products at once, where registers hold them; else they are computed twice, first for delta.
constexpr bool KEEPS = WINDOW <= 7;

// Sums of dS over the columns, and over the rows, of the window, as strips in shared memory. Zeros beside what is
// summed are never written.
constexpr int ROW_PARTS = (HALO_ROWS + 7) / 8;
constexpr BOTH int at_least(int x, int y) { return x > y ? x : y; }
constexpr int ROW_SUMS = round_up(at_least(8 * ROW_PARTS, 8 * OFFSET_PARTS + TILE_ROWS - 1), 4);
constexpr int COL_SUMS = round_up(at_least(8 * HALO_PARTS, 8 * OFFSET_PARTS + TILE_COLS - 1), 4);
constexpr int SUMS = HAS_REL ? 16 * (ROW_SUMS + COL_SUMS) * 4 : 0;   // bytes of a warp

// The tables once more, as columns of the product of those sums with them. A part has the eight channels of a piece,
// and one table; at depth 8 both tables share the piece.
constexpr int BACK_PARTS = PIECES > 1 ? PIECES : 2, BACK_WORDS = BACK_PARTS * OFFSET_PARTS;
constexpr int BACK_BYTES = HAS_REL ? 32 * BACK_WORDS * 4 : 0;

constexpr int STRIPS_AT = RING_ROWS * RING_ROW, TABLES_AT = STRIPS_AT + WARPS * STRIPS;
constexpr int BUFFERS_AT = TABLES_AT + TABLE_BYTES, SUMS_AT = BUFFERS_AT + WARPS * BUFFER, BACK_AT = SUMS_AT + WARPS * SUMS;
static_assert(BACK_AT + BACK_BYTES == SHARED_BYTES, "the host reckons with other shared memory");
// At the end, the tables' gradients of each warp are where the ring was.
static_assert(WARPS * DEPTH * 8 * OFFSET_PARTS * 4 <= STRIPS_AT, "the tables' gradients do not fit");

// At depth 64 each word of a thread is of one table: the fifth of the other than the first, and so on. So a sum of the
// one shares its registers with a sum of the other.
constexpr bool SHARES = DEPTH == 64;
constexpr int TABLE_WORDS = SHARES ? USED_WORDS / 2 : USED_WORDS;

constexpr uint32_t ONE = BF16 ? 0x3f80 : 0x3c00, ONES = ONE | ONE << 16;
}  // namespace

KERNEL(backward_queries)(const Arguments p) {
  const Thread thread;
  const int g = thread.g, t = thread.t;
  const Piece piece(p);
  const uint32_t ring = shared_base(), tables = ring + TABLES_AT;
  const uint32_t back_at = ring + BACK_AT + thread.lane * BACK_WORDS * 4;
  const Strips strips(ring + STRIPS_AT + thread.warp * STRIPS, thread);
  const Writer writer(ring + BUFFERS_AT + thread.warp * BUFFER, thread);
  store_tables(tables, p, piece.head, thread);
  const uint32_t sums = ring + SUMS_AT + thread.warp * SUMS, col_sums = sums + 16 * ROW_SUMS * 4;
  for (int i = thread.lane; i < SUMS / 4; i += 32) store_shared1(sums + 4 * i, 0);
  if (HAS_REL && thread.warp == 0) {
    for (int i = 0; i < BACK_PARTS; ++i) {
      const int is_col = 2 * i / BACK_PARTS, channel = PIECES > 1 ? 8 * i + g : g;
      const uint16_t* table = (is_col ? p.rel_col : p.rel_row) + piece.head * p.table_stride;
      for (int part = 0; part < OFFSET_PARTS; ++part) {
        const int offset = 8 * part + 2 * t;
        const uint32_t x = table_number(table, is_col, channel, offset) | table_number(table, is_col, channel, offset + 1) << 16;
        store_shared1(back_at + (i * OFFSET_PARTS + part) * 4, x);
      }
    }
  }
  meet_warp();
  const uint32_t row_sums_to = whole(sums + (g * ROW_SUMS + 2 * t) * 4), col_sums_to = whole(col_sums + (g * COL_SUMS + 2 * t) * 4);
  const uint32_t row_sums_from = whole(row_sums_to + thread.row * 4), col_sums_from = whole(col_sums_to + thread.col * 4);

  const Plane<uint16_t> query = plane_of(p.query, piece), key = plane_of(p.key, piece), grad = plane_of(p.grad, piece);
  const Plane<uint16_t> grad_query = plane_of(p.grad_query, piece);
  Plane<uint16_t> value = key;
  value.data = plane_of(p.value, piece).data;
  const Plane<float> lse = plane_of(p.lse, p, piece), delta = plane_of(p.delta, p, piece);
  const Loader loader(thread, piece.left);
  auto load = [&](int chunk, int ring_row) {
    const uint32_t to = ring + (ring_row + loader.warp) * RING_ROW;
    const int row = loader.map_row(chunk);
    if (HAS_KEY) loader.copy(to, key, row, piece.height, piece.width);
    loader.copy(to + VALUES, value, row, piece.height, piece.width);
  };
  const uint32_t words = whole(words_at(thread.right + g, t));
  const Matrices matrices(thread.right, thread.lane, RING_ROW);
  // The identity as columns of a product, and the row of a sum that a thread has.
  const uint32_t identity = (2 * t == g ? ONE : 0) | (2 * t + 1 == g ? ONE << 16 : 0);

  float grad_tables[OFFSET_PARTS][TABLE_WORDS][4] = {};
  if (piece.first < piece.last)
    for (int i = 0; i < CHUNKS; ++i) load(piece.first + i, 8 * i);
  int at = 0;
  for (int chunk = piece.first; chunk < piece.last; ++chunk, at = next_chunk(at)) {
    const int row = 8 * chunk + thread.down + thread.row, col = piece.left + thread.right + thread.col;
    const bool there[2] = {row < piece.height && col < piece.width, row + HALF_ROWS < piece.height && col < piece.width};
    Rows queries, grads;
    queries.load(query.at(row, col), HALF_ROWS * query.row_stride, there, t);
    grads.load(grad.at(row, col), HALF_ROWS * grad.row_stride, there, t);
    float lses[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      lses[half] = there[half] ? load_global<float>(lse.at(row + half * HALF_ROWS, col)) : infinite();
    wait_for_copies();
    meet_block();
    queries.separate(p.zero);
    grads.separate(p.zero);
    if (chunk + 1 < piece.last) load(chunk + CHUNKS, free_chunk(at));

    Terms terms;
    terms.compute(queries, tables, strips, thread, piece, row, col);
    const Halo<RING_ROW> halo(ring, at, thread.down);
    // P and dP of one product; nothing in dead halves.
    auto weights_and_grads = [&](int n, float(&weights)[4], float(&d)[4]) {
      float s[4];
      terms.begin(s, n);
      const uint32_t from = halo.row(row_of(n)) + words + part_of(n) * 8 * PIXEL;
      uint32_t pixels[WORDS];
      if (HAS_KEY) {
        load_words(pixels, from, p.zero);
        multiply(s, queries, pixels);
      }
      load_words(pixels, from + VALUES, p.zero);
      d[0] = d[1] = d[2] = d[3] = 0.f;
      multiply(d, grads, pixels);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (is_live(i / 2, n)) weights[i] = exp2_of(fmaf(s[i], p.factor, -lses[i / 2]));
    };

    float weights[KEEPS ? PRODUCTS : 1][4], d[KEEPS ? PRODUCTS : 1][4], deltas[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < PRODUCTS; ++n) {
      if (!KEEPS) meet_warp();
      const int to = KEEPS ? n : 0;
      weights_and_grads(n, weights[to], d[to]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (is_live(i / 2, n)) deltas[i / 2] = fmaf(weights[to][i], d[to][i], deltas[i / 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      deltas[half] += exchange(deltas[half], 1);
      deltas[half] += exchange(deltas[half], 2);
      if (t == 0 && there[half]) store_global(delta.at(row + half * HALF_ROWS, col), as_bits(deltas[half]));
    }

    float dq[PIECES][4] = {}, by_row[ROW_PARTS][4] = {}, by_col[HALO_PARTS][4] = {};
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      uint32_t ds[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int from = KEEPS ? n + i : 0;
        if (!KEEPS) meet_warp();
        if (!KEEPS) weights_and_grads(n + i, weights[from], d[from]);
#pragma unroll
        for (int half = 0; half < 2; ++half)
          ds[2 * i + half] = is_live(half, n + i)
                                 ? pack(weights[from][2 * half] * (d[from][2 * half] - deltas[half]),
                                        weights[from][2 * half + 1] * (d[from][2 * half + 1] - deltas[half]))
                                 : p.zero;
      }
      if (HAS_KEY) matrices.multiply_with(dq, ds, halo.row(row_of(n)));
      if (HAS_REL) {
        const int row0 = row_of(n), row1 = row_of(n + 1);
        static_assert(HALO_PARTS > 1 || HALO_ROWS % 2 == 0, "a pair of rows lies in one part");
        multiply(by_row[row0 / 8], ds[0], ds[1], ds[2], ds[3], g == row0 % 8 ? ONES : 0, g == row1 % 8 ? ONES : 0);
        if (HALO_PARTS == 1) {
          multiply(by_col[0], ds[0], ds[1], ds[2], ds[3], identity, identity);
        } else {
          multiply(by_col[0], ds[0], ds[1], ds[2], ds[3], identity, p.zero);
          multiply(by_col[HALO_PARTS - 1], ds[0], ds[1], ds[2], ds[3], p.zero, identity);
        }
      }
    }

    if (HAS_REL) {
      meet_warp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i)
          store_shared2(row_sums_to + (half * 8 * ROW_SUMS + 8 * i) * 4,
                        make_uint2(as_bits(by_row[i][2 * half]), as_bits(by_row[i][2 * half + 1])));
#pragma unroll
        for (int i = 0; i < HALO_PARTS; ++i)
          store_shared2(col_sums_to + (half * 8 * COL_SUMS + 8 * i) * 4,
                        make_uint2(as_bits(by_col[i][2 * half]), as_bits(by_col[i][2 * half + 1])));
      }
      meet_warp();
      // By offset: the rows' sums, and the columns', as rows of a product. Of two parts, each table has its own rows.
      uint32_t rows[OFFSET_PARTS][4];
#pragma unroll
      for (int part = 0; part < OFFSET_PARTS; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t row_from = row_sums_from + (half * (8 * ROW_SUMS + HALF_ROWS) + 8 * part) * 4;
          const uint32_t col_from = col_sums_from + (half * 8 * COL_SUMS + 8 * part) * 4;
          const uint32_t of_row = pack(as_float(load_shared1(row_from)), as_float(load_shared1(row_from + 4)));
          const uint32_t of_col = pack(as_float(load_shared1(col_from)), as_float(load_shared1(col_from + 4)));
          rows[0][OFFSET_PARTS == 1 ? half : 2 * part + half] = of_row;
          rows[OFFSET_PARTS - 1][OFFSET_PARTS == 1 ? 2 + half : 2 * part + half] = of_col;
        }
      uint32_t back[BACK_WORDS];
#pragma unroll
      for (int i = 0; i + 3 < BACK_WORDS; i += 4) {
        const uint4 four = load_shared4(back_at + 4 * i);
        back[i] = four.x, back[i + 1] = four.y, back[i + 2] = four.z, back[i + 3] = four.w;
      }
      if (BACK_WORDS % 4) {
        const uint2 two = load_shared2(back_at + 4 * (BACK_WORDS - 2));
        back[BACK_WORDS - 2] = two.x, back[BACK_WORDS - 1] = two.y;
      }
#pragma unroll
      for (int i = 0; i < BACK_PARTS; ++i) {
        const int is_col = 2 * i / BACK_PARTS, c = PIECES > 1 ? i : 0;
        const uint32_t(&a)[4] = rows[OFFSET_PARTS == 1 ? 0 : is_col];
        if (OFFSET_PARTS == 1)
          multiply(dq[c], a[0], a[1], a[2], a[3], is_col ? p.zero : back[i], is_col ? back[i] : p.zero);
        else
          multiply(dq[c], a[0], a[1], a[2], a[3], back[OFFSET_PARTS * i], back[OFFSET_PARTS * i + 1]);
      }
      uint32_t offsets[OFFSET_PARTS][4];
#pragma unroll
      for (int i = 0; i < OFFSET_PARTS; ++i) {
        offsets[i][0] = transpose(rows[i][0]), offsets[i][1] = transpose(rows[i][2]);
        offsets[i][2] = transpose(rows[i][1]), offsets[i][3] = transpose(rows[i][3]);
      }
#pragma unroll
      for (int word = 0; word < USED_WORDS; ++word) {
        const uint32_t b0 = transpose(queries.x[2 * word]), b1 = transpose(queries.x[2 * word + 1]);
#pragma unroll
        for (int i = 0; i < OFFSET_PARTS; ++i) {
          const int is_col = word / TABLE_WORDS;   // where SHARES
          if (SHARES && OFFSET_PARTS > 1 && i != is_col) continue;
          const uint32_t(&a)[4] = offsets[i];
          const bool rows_alone = SHARES && OFFSET_PARTS == 1 && !is_col, cols_alone = SHARES && OFFSET_PARTS == 1 && is_col;
          multiply(grad_tables[i][word % TABLE_WORDS], cols_alone ? p.zero : a[0], rows_alone ? p.zero : a[1],
                   cols_alone ? p.zero : a[2], rows_alone ? p.zero : a[3], b0, b1);
        }
      }
    }
    writer.store(dq, p.scale, p.scale, grad_query.at(row, col), HALF_ROWS * grad_query.row_stride, there);
  }

  if (!HAS_REL) return;
  // Summed over the block's warps, in their order.
  meet_block();
  constexpr int OFFSETS = 8 * OFFSET_PARTS;
#pragma unroll
  for (int i = 0; i < OFFSET_PARTS; ++i)
#pragma unroll
    for (int word = 0; word < TABLE_WORDS; ++word)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int is_col = OFFSET_PARTS == 1 ? e / 2 : i, offset = g + (OFFSET_PARTS == 1 ? 0 : e / 2 * 8);
        const int channel = channel_of(t, SHARES && is_col ? word + TABLE_WORDS : word) + e % 2;
        if (is_col == channel / (DEPTH / 2))
          store_shared1(ring + ((thread.warp * DEPTH + channel) * OFFSETS + offset) * 4, as_bits(grad_tables[i][word][e]));
      }
  meet_block();
  for (int i = thread.index; i < DEPTH * WINDOW; i += THREADS) {
    float sum = 0.f;
    for (int warp = 0; warp < WARPS; ++warp)
      sum += as_float(load_shared1(ring + ((warp * DEPTH + i / WINDOW) * OFFSETS + i % WINDOW) * 4));
    store_global(p.partials + (int64_t)blockIdx.x * (DEPTH * WINDOW) + i, as_bits(sum * p.scale));
  }
}
