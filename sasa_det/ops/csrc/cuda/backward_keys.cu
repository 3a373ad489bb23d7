// dK and dV. A warp has 16 keys, and gathers from all queries whose windows they are in: here the halo is of queries.
#include "tile.cuh"

namespace {
// A row of the ring: queries, gradients of the output, delta, lse, and what S begins with. That is a term by the key's
// row in the window and one by its column, less the log-sum-exp; -infinity beside the window.
constexpr int TERM_ROWS = WINDOW + 2 * (HALF_ROWS - 1), FIRST_ROW = HALF_ROWS - 1;
constexpr int TERM_COLS = 8 * HALO_PARTS + TILE_COLS - 1, FIRST_COL = 8 * HALO_PARTS - WINDOW;
constexpr int LINE = PITCH * 4;   // bytes of a number for each pixel of a row
constexpr int GRADS = MAP_ROW, DELTA = 2 * MAP_ROW, LSE = DELTA + LINE, ROW_TERMS = LSE + LINE;
constexpr int COL_TERMS = ROW_TERMS + TERM_ROWS * LINE, RING_ROW = round_up(COL_TERMS + TERM_COLS * LINE, 128);
constexpr int TABLES_AT = RING_ROWS * RING_ROW, BUFFERS_AT = TABLES_AT + TABLE_BYTES;
static_assert(BUFFERS_AT + WARPS * BUFFER == SHARED_BYTES, "the host reckons with other shared memory");
}  // namespace

KERNEL(backward_keys)(const Arguments p) {
  const Thread thread;
  const int g = thread.g, t = thread.t;
  const Piece piece(p);
  if (piece.first >= piece.last) return;
  const uint32_t ring = shared_base(), tables = ring + TABLES_AT;
  const Writer writer(ring + BUFFERS_AT + thread.warp * BUFFER, thread);
  store_tables(tables, p, piece.head, thread);
  for (int row = thread.warp; row < RING_ROWS; row += WARPS)
    for (int i = thread.lane; i < (TERM_ROWS + TERM_COLS) * PITCH; i += 32)
      store_shared1(ring + row * RING_ROW + ROW_TERMS + 4 * i, as_bits(-infinite()));

  const Plane<uint16_t> query = plane_of(p.query, piece), key = plane_of(p.key, piece), grad = plane_of(p.grad, piece);
  const Plane<uint16_t> grad_key = plane_of(p.grad_key, piece);
  Plane<uint16_t> value = key, grad_value = grad_key;
  value.data = plane_of(p.value, piece).data;
  grad_value.data = plane_of(p.grad_value, piece).data;
  const Plane<float> lse = plane_of(p.lse, p, piece), delta = plane_of(p.delta, p, piece);
  const Loader loader(thread, piece.left);
  auto load = [&](int chunk, int ring_row) {
    const uint32_t to = ring + (ring_row + loader.warp) * RING_ROW;
    const int row = loader.map_row(chunk);
    if (HAS_KEY || HAS_REL) loader.copy(to, query, row, piece.height, piece.width);
    loader.copy(to + GRADS, grad, row, piece.height, piece.width);
    if (thread.lane >= PITCH) return;
    const int col = piece.left + thread.lane - RADIUS;
    const bool there = row >= 0 && row < piece.height && col >= 0 && col < piece.width;
    if (HAS_KEY) copy4(to + DELTA + 4 * thread.lane, delta.at(row, col), there);
    copy4(to + LSE + 4 * thread.lane, lse.at(row, col), there);
  };
  // What S begins with, for the queries of a chunk; a warp takes a row of them, 16 at a time.
  auto store_terms = [&](int chunk, int ring_row) {
    const uint32_t from = ring + (ring_row + thread.warp) * RING_ROW;
    const int row = loader.map_row(chunk);
#pragma unroll
    for (int first = 0; first < PITCH; first += 16) {
      const bool lower = first + 8 < PITCH;
      Rows queries;
      if (HAS_REL) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t x[WORDS];
#pragma unroll
          for (int i = 0; i < WORDS; ++i) x[i] = p.zero;
          // Beyond the row's end any pixel will do: its terms are not stored.
          const int query_col = first + 8 * half + 8 <= PITCH ? first + 8 * half + g : min(first + 8 * half + g, PITCH - 1);
          if (half == 0 || lower) load_words(x, from + words_at(query_col, t), p.zero);
#pragma unroll
          for (int i = 0; i < WORDS; ++i) queries.x[2 * i + half] = x[i];
        }
      }
      float minus_lse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_row = first + 8 * half + g, col = piece.left + in_row - RADIUS;
        const bool there = row >= 0 && row < piece.height && col >= 0 && col < piece.width;
        minus_lse[half] = -infinite();
        if (there && in_row < PITCH) minus_lse[half] = as_float(load_shared1(from + LSE + 4 * in_row)) * -p.inverse;
      }
#pragma unroll
      for (int part = 0; part < OFFSET_PARTS; ++part) {
        float x[4], y[4];
        multiply_table(x, queries, tables, 0, part, thread.lane);
        multiply_table(y, queries, tables, 1, part, thread.lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2, offset = 8 * part + 2 * t + i % 2, in_row = first + 8 * half + g;
          if (first + 8 * half >= PITCH) continue;
          if ((first + 8 * half + 8 > PITCH && in_row >= PITCH) || (8 * part + 7 >= WINDOW && offset >= WINDOW)) continue;
          store_shared1(from + ROW_TERMS + (offset + FIRST_ROW) * LINE + 4 * in_row, as_bits(x[i]));
          store_shared1(from + COL_TERMS + (offset + FIRST_COL) * LINE + 4 * in_row, as_bits(y[i] + minus_lse[half]));
        }
      }
    }
  };
  const uint32_t words = whole(words_at(thread.right + g, t));
  const Matrices matrices(thread.right, thread.lane, RING_ROW);
  // Of the queries 2t and 2t + 1: their numbers, the term of the halo's first row and that of its first column.
  const uint32_t line = whole((thread.right + 2 * t) * 4);
  const uint32_t row_terms = whole(line + ROW_TERMS + (thread.row + WINDOW - 1 + FIRST_ROW) * LINE);
  const uint32_t col_terms = whole(line + COL_TERMS + (thread.col + WINDOW - 1 + FIRST_COL - 2 * t) * LINE);
  for (int i = 0; i < CHUNKS; ++i) load(piece.first + i, 8 * i);

  int at = 0;
  for (int chunk = piece.first; chunk < piece.last; ++chunk, at = next_chunk(at)) {
    const int row = 8 * chunk + thread.down + thread.row, col = piece.left + thread.right + thread.col;
    const bool there[2] = {row < piece.height && col < piece.width, row + HALF_ROWS < piece.height && col < piece.width};
    Rows keys, values;
    if (HAS_KEY) {
      keys.load(key.at(row, col), HALF_ROWS * key.row_stride, there, t);
      values.load(value.at(row, col), HALF_ROWS * value.row_stride, there, t);
    }
    wait_for_copies();
    meet_block();
    if (chunk + 1 < piece.last) load(chunk + CHUNKS, free_chunk(at));
    for (int i = chunk == piece.first ? 0 : CHUNKS - 1; i < CHUNKS; ++i)
      store_terms(chunk + i, at + 8 * i < RING_ROWS ? at + 8 * i : at + 8 * i - RING_ROWS);
    meet_block();
    if (HAS_KEY) {
      keys.separate(p.zero);
      values.separate(p.zero);
    }

    const Halo<RING_ROW> halo(ring, at, thread.down);
    float dk[PIECES][4] = {}, dv[PIECES][4] = {};
#pragma unroll
    for (int n = 0; n < PRODUCTS; n += 2) {
      uint32_t weights[4], ds[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = n + i, part = part_of(m);
        const uint32_t from = halo.row(row_of(m));
        float s[4], d[4];
        const float term0 = as_float(load_shared1(from + col_terms + 8 * part * (4 - LINE)));
        const float term1 = as_float(load_shared1(from + col_terms + 8 * part * (4 - LINE) + 4 - LINE));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!is_live(half, m)) {
            s[2 * half] = s[2 * half + 1] = anything();
            continue;
          }
          const uint2 terms = load_shared2(from + row_terms + 32 * part - (row_of(m) - half * HALF_ROWS) * LINE);
          s[2 * half] = as_float(terms.x) + term0;
          s[2 * half + 1] = as_float(terms.y) + term1;
        }
        if (HAS_KEY) {
          uint32_t pixels[WORDS];
          load_words(pixels, from + words + part * 8 * PIXEL, p.zero);
          multiply(s, keys, pixels);
          const uint2 deltas = load_shared2(from + line + DELTA + 32 * part);
          d[0] = d[2] = -as_float(deltas.x);
          d[1] = d[3] = -as_float(deltas.y);
          load_words(pixels, from + words + GRADS + part * 8 * PIXEL, p.zero);
          multiply(d, values, pixels);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weights[2 * i + half] = ds[2 * i + half] = p.zero;
          if (!is_live(half, m)) continue;
          const float w0 = exp2_of(s[2 * half] * p.factor), w1 = exp2_of(s[2 * half + 1] * p.factor);
          weights[2 * i + half] = pack(w0, w1);
          if (HAS_KEY) ds[2 * i + half] = pack(w0 * d[2 * half], w1 * d[2 * half + 1]);
        }
      }
      if (HAS_KEY) matrices.multiply_with(dk, ds, halo.row(row_of(n)));
      matrices.multiply_with(dv, weights, halo.row(row_of(n)) + GRADS);
    }
    if (HAS_KEY) {
      writer.store(dk, p.scale, p.scale, grad_key.at(row, col), HALF_ROWS * grad_key.row_stride, there);
      meet_warp();
    }
    writer.store(dv, 1.f, 1.f, grad_value.at(row, col), HALF_ROWS * grad_value.row_stride, there);
  }
}
