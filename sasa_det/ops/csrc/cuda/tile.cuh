// What the three kernels share: how a map is cut, the ring of rows in shared memory, fragments, relative terms.
// README.md has the notation and drawings.
#pragma once

// Options, set by the compiler's command line: BF16 (else float16), DEPTH of a head, WINDOW, and 0 or 1 for
// MASK_BORDER, DILATED, HAS_KEY and HAS_REL. SHARED_BYTES and ARGUMENT_BYTES are what the host reckons with.

constexpr int WARPS = 8, THREADS = 32 * WARPS;

#include "device.cuh"
#include "arguments.cuh"

constexpr int RADIUS = WINDOW / 2;

// A block takes 8 x 16 pixels at a time, and each warp a tile of 16 of them. The tile's edges are those for which
// the products compute the fewest pairs in vain.
constexpr int BLOCK_ROWS = 8, BLOCK_COLS = 16;
constexpr int TILE_COLS = WINDOW == 7 ? 2 : WINDOW == 9 ? 8 : 4, TILE_ROWS = 16 / TILE_COLS;
constexpr int WARPS_ACROSS = BLOCK_COLS / TILE_COLS;
// A thread has accumulators of two pixels, m = g and m = g + 8: the upper and the lower half of the tile.
constexpr int HALF_ROWS = TILE_ROWS / 2;
// The tile's halo is all that its windows reach. Eight columns of a row of it are the columns of one product.
constexpr int HALO_ROWS = TILE_ROWS + WINDOW - 1, HALO_PARTS = (TILE_COLS + WINDOW - 1 + 7) / 8;
constexpr int PRODUCTS = HALO_ROWS * HALO_PARTS;
// Rows of the halo that the windows of one half reach.
constexpr int LIVE_ROWS = HALF_ROWS + WINDOW - 1;
constexpr DEV int row_of(int product) { return product / HALO_PARTS; }
constexpr DEV int part_of(int product) { return product % HALO_PARTS; }
constexpr DEV bool is_live(int half, int product) {
  return row_of(product) >= half * HALF_ROWS && row_of(product) < half * HALF_ROWS + LIVE_ROWS;
}
// Offsets in the window, as columns of products.
constexpr int OFFSET_PARTS = (WINDOW + 7) / 8;

// --- Channels. A pixel's are PIECES of 16 bytes in shared memory. As a column of the first product, where channels
// are summed over, a thread has WORDS of a pixel, two channels each, in the order in which it loads them.
constexpr int PIECES = DEPTH / 8, PIXEL = 2 * DEPTH;
constexpr int STEPS = DEPTH <= 16 ? 1 : DEPTH / 16, WORDS = 2 * STEPS;
constexpr int USED_WORDS = DEPTH / 8;   // at depth 8, the second is zero
constexpr int WORDS_TOGETHER = USED_WORDS < 4 ? USED_WORDS : 4;
// Of the two channels in a thread's word, the first.
constexpr DEV int channel_of(int t, int word) { return 2 * WORDS_TOGETHER * t + 2 * (word % 4) + 32 * (word / 4); }

// --- The ring: rows of the block's halo, of two maps. While one chunk of 8 rows is computed with the next, a third
// is loaded.
constexpr int CHUNKS = (BLOCK_ROWS + WINDOW - 1 + 7) / 8, RING_ROWS = 8 * (CHUNKS + 1);
constexpr BOTH int round_up(int x, int to) { return (x + to - 1) / to * to; }
constexpr int PITCH = round_up(BLOCK_COLS - TILE_COLS + 8 * HALO_PARTS, 4);   // pixels of a row
constexpr int MAP_ROW = PITCH * PIXEL;                                        // bytes of a row, of one map

// Where a piece of a pixel is among the pixel's pieces: so that eight pixels' same pieces, and two pixels' first four,
// lie in different banks.
constexpr DEV int swizzle(int col) {
  return DEPTH == 64 ? (col & 1) << 2 | (col >> 1 & 3) : (col * PIECES / 8) % PIECES;
}

// --- Arguments
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the host's structure differs");

// The place of a thread, in its warp's tile and for products.
struct Thread {
  int index = threadIdx.x, lane = index & 31, warp = index >> 5, g = lane >> 2, t = lane & 3;
  // The warp's tile in the block, and the thread's upper pixel in the tile.
  int down = WARPS == WARPS_ACROSS ? 0 : warp / WARPS_ACROSS * TILE_ROWS, right = warp % WARPS_ACROSS * TILE_COLS;
  int row = g / TILE_COLS, col = g % TILE_COLS;
};

// A piece of a strip: BLOCK_COLS columns of one head, in one phase of the dilation, and its chunks from first to last.
struct Piece {
  int image, head, left, first, last;
  int phase_row = 0, phase_col = 0, height, width, step = 1;

  DEV explicit Piece(const Arguments& p) {
    int index = blockIdx.x;
    first = index % p.pieces * p.length;
    index /= p.pieces;
    left = index % p.across * BLOCK_COLS;
    index /= p.across;
    height = p.height;
    width = p.width;
    if (DILATED) {
      const int phases_across = min(p.dilation, p.width), phases = min(p.dilation, p.height) * phases_across;
      const int phase = index % phases;
      index /= phases;
      phase_row = phase / phases_across;
      phase_col = phase % phases_across;
      step = p.dilation;
      height = (p.height - phase_row + step - 1) / step;
      width = (p.width - phase_col + step - 1) / step;
    }
    head = index % p.heads;
    image = index / p.heads;
    last = min(first + p.length, (height + BLOCK_ROWS - 1) / BLOCK_ROWS);
  }
};

// One head of one image of a map, in one phase; rows and columns count the pixels of the phase.
template <typename T>
struct Plane {
  T* data;
  int row_stride, col_stride;
  // The host takes no map with an image of 2^30 elements, so that the halo fits as well.
  DEV T* at(int row, int col) const { return data + (row * row_stride + col * col_stride); }
};
DEV Plane<uint16_t> plane_of(const Map& map, const Piece& piece) {
  uint16_t* data = map.data + (piece.image * map.image + piece.head * DEPTH);
  if (DILATED) data += piece.phase_row * map.row + piece.phase_col * map.col;
  return {data, map.row * piece.step, map.col * piece.step};
}
DEV Plane<float> plane_of(float* sums, const Arguments& p, const Piece& piece) {
  sums += ((int64_t)piece.image * p.heads + piece.head) * p.height * p.width;
  if (DILATED) sums += piece.phase_row * p.width + piece.phase_col;
  return {sums, p.width * piece.step, piece.step};
}

// Copies chunks of a map into the ring; warp w takes row w of a chunk.
struct Loader {
  static constexpr int COPIES = (PITCH * PIECES + 31) / 32, COLS = 32 / PIECES;   // each of so many columns
  uint32_t to;
  int warp, col, map_col, piece;

  DEV Loader(const Thread& thread, int left) : warp(thread.warp) {
    col = thread.lane / PIECES;
    map_col = left + col - RADIUS;
    piece = thread.lane % PIECES;
    to = col * PIXEL + ((piece ^ swizzle(col)) << 4);
  }
  DEV int map_row(int chunk) const { return 8 * chunk + warp - RADIUS; }
  // Copies a row of the map to an address. Pixels out of the map become zeros, and nothing is read for them.
  DEV void copy(uint32_t ring_row, const Plane<uint16_t>& map, int row, int height, int width) const {
    const uint16_t* from = map.at(row, map_col) + piece * 8;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
      // At depth 64, columns four apart have the pieces in another order.
      const uint32_t at = (to ^ (DEPTH == 64 && i % 2 ? 2 << 4 : 0)) + i * COLS * PIXEL;
      const bool there = row >= 0 && row < height && map_col + i * COLS >= 0 && map_col + i * COLS < width;
      if (COPIES * COLS == PITCH || col + i * COLS < PITCH) copy16(ring_row + at, from + i * COLS * map.col_stride, there);
    }
  }
};

// --- Fragments

// Where a thread's words of a pixel begin in a row of the ring.
DEV int words_at(int col, int t) {
  const int piece = DEPTH >= 32 ? t : DEPTH == 16 ? t >> 1 : 0;
  return col * PIXEL + ((piece ^ swizzle(col)) << 4) + (DEPTH == 16 ? (t & 1) * 8 : DEPTH == 8 ? t * 4 : 0);
}
DEV void load_words(uint32_t (&x)[WORDS], uint32_t at, uint32_t zero) {
  if (DEPTH >= 32) {
#pragma unroll
    for (int i = 0; i < USED_WORDS / 4; ++i) {
      const uint4 four = load_shared4(at ^ i * 64);
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  } else if (DEPTH == 16) {
    const uint2 two = load_shared2(at);
    x[0] = two.x, x[1] = two.y;
  } else {
    x[0] = load_shared1(at), x[1] = zero;
  }
}

// A tile's 16 pixels as rows of products: for each step, the a0 to a3 of `multiply`.
struct Rows {
  uint32_t x[2 * WORDS];

  // From the map: a pixel, and that `to_lower` elements further on; zeros for pixels that are not there. The XOR is so that they stay single registers.
  DEV void load(const uint16_t* pixel, int to_lower, const bool (&there)[2], int t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; ++i) words[i] = 0;
      if (there[half]) {
        const uint16_t* from = pixel + half * to_lower + channel_of(t, 0);
        if (DEPTH >= 32) {
#pragma unroll
          for (int i = 0; i < USED_WORDS / 4; ++i) {
            const uint4 four = load_global<uint4>(from + 32 * i);
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
          }
        } else if (DEPTH == 16) {
          const uint2 two = load_global<uint2>(from);
          words[0] = two.x, words[1] = two.y;
        } else {
          words[0] = load_global<uint32_t>(from);
        }
      }
#pragma unroll
      for (int i = 0; i < WORDS; ++i) x[2 * i + half] = words[i];
    }
  }
  DEV void separate(uint32_t zero) {
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) x[i] ^= zero;
  }
};

// d += rows times pixels, summed over channels; steps first to last only.
DEV void multiply(float (&d)[4], const Rows& rows, const uint32_t (&pixels)[WORDS], int first = 0, int last = STEPS) {
#pragma unroll
  for (int s = first; s < last; ++s)
    multiply(d, rows.x[4 * s], rows.x[4 * s + 1], rows.x[4 * s + 2], rows.x[4 * s + 3], pixels[2 * s], pixels[2 * s + 1]);
}

// The same pixels as rows of a product, summed over 16 pixels: those of a pair of products, which are of two rows of the
// halo, or of two parts of a row. Lane l points to a pixel of the first (second) product, and to the first (second) of
// two pieces.
struct Matrices {
  uint32_t at[PIECES > 1 ? PIECES / 2 : 1];   // from the row of the first product, for each two pieces

  DEV Matrices(int right, int lane, int ring_row) {
    const int matrix = lane >> 3, second = matrix & 1, piece = PIECES > 1 ? matrix >> 1 : 0;
    const int col = right + (lane & 7) + (HALO_PARTS > 1 ? 8 * second : 0);
    const int first = (HALO_PARTS > 1 ? 0 : second * ring_row) + col * PIXEL + ((piece ^ swizzle(col)) << 4);
#pragma unroll
    for (int i = 0; i < PIECES; i += 2) at[i / 2] = whole(first ^ i << 4);
  }
  // d += weights times pixels; d has the channels 8 c to 8 c + 7.
  DEV void multiply_with(float (&d)[PIECES][4], const uint32_t (&weights)[4], uint32_t ring_row) const {
#pragma unroll
    for (int c = 0; c < PIECES; c += 2) {
      uint32_t x[4];
      if (PIECES == 1)
        load_matrices2(x, ring_row + at[0]);
      else
        load_matrices4(x, ring_row + at[c / 2]);
      multiply(d[c], weights[0], weights[1], weights[2], weights[3], x[0], x[1]);
      if (PIECES > 1) multiply(d[PIECES > 1 ? c + 1 : 0], weights[0], weights[1], weights[2], weights[3], x[2], x[3]);
    }
  }
};

// Addresses of the rows of the halo of a warp's tile, in a ring with `stride` bytes from row to row.
template <int STRIDE>
struct Halo {
  static constexpr int GROUPS = (HALO_ROWS + TILE_ROWS - 1) / TILE_ROWS;   // of TILE_ROWS rows, none of which wraps
  uint32_t group[GROUPS];
  DEV Halo(uint32_t base, int first, int down) {
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
      const int row = first + down + i * TILE_ROWS;
      group[i] = base + (row < RING_ROWS ? row : row - RING_ROWS) * STRIDE;
    }
  }
  DEV uint32_t row(int i) const { return group[i / TILE_ROWS] + i % TILE_ROWS * STRIDE; }
};
DEV int next_chunk(int ring_row) { return ring_row + 8 < RING_ROWS ? ring_row + 8 : 0; }
// The row of the ring where the chunk goes that is loaded while this one is computed.
DEV int free_chunk(int ring_row) { return ring_row ? ring_row - 8 : RING_ROWS - 8; }

// Stores a tile's pixels, through a buffer of the warp: there each thread finds the words of its pixels together.
constexpr int BUFFER = 16 * PIXEL;
struct Writer {
  uint32_t to, from;
  int t;

  DEV Writer(uint32_t buffer, const Thread& thread) : t(thread.t) {
    to = whole(buffer + thread.g * PIXEL + (swizzle(thread.g) << 4) + 4 * t);
    from = whole(buffer + words_at(thread.g, t));
  }
  // d times a factor for each half, to a pixel and to that `to_lower` elements further on.
  DEV void store(const float (&d)[PIECES][4], float upper, float lower, uint16_t* pixel, int to_lower, const bool (&there)[2]) const {
#pragma unroll
    for (int c = 0; c < PIECES; ++c) {
      store_shared1(to ^ c << 4, pack(d[c][0] * upper, d[c][1] * upper));
      store_shared1((to ^ c << 4) + 8 * PIXEL, pack(d[c][2] * lower, d[c][3] * lower));
    }
    meet_warp();
    pixel += channel_of(t, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[WORDS];
      load_words(x, from + half * 8 * PIXEL, 0);
      if (!there[half]) continue;
      uint16_t* const at = pixel + half * to_lower;
      if (DEPTH == 8) store_global(at, x[0]);
      if (DEPTH == 16) store_global(at, make_uint2(x[0], x[1]));
#pragma unroll
      for (int i = 0; i + 3 < USED_WORDS; i += 4) store_global(at + 8 * i, make_uint4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    }
  }
};

// --- Relative tables

DEV float infinite() { return as_float(0x7f800000); }

// A number of a table of a head, zero where there is none: `channel` counts from the head's first channel.
DEV uint32_t table_number(const uint16_t* table, int is_col, int channel, int offset) {
  channel -= is_col * (DEPTH / 2);
  if (channel < 0 || channel >= DEPTH / 2 || offset >= WINDOW) return 0;
  return load_global<uint16_t>(table + channel * WINDOW + offset);
}

// The two tables in shared memory as columns of the product of queries with them: for each part of the offsets a
// thread's words, the threads' one after the other.
constexpr int TABLE_BYTES = HAS_REL ? 2 * OFFSET_PARTS * 32 * WORDS * 4 : 0;
DEV uint32_t table_at(int is_col, int part, int lane) { return ((is_col * OFFSET_PARTS + part) * 32 + lane) * WORDS * 4; }

DEV void store_tables(uint32_t to, const Arguments& p, int head, const Thread& thread) {
  if (!HAS_REL) return;
  for (int i = thread.warp; i < 2 * OFFSET_PARTS; i += WARPS) {
    const int is_col = i / OFFSET_PARTS, part = i % OFFSET_PARTS;
    const uint16_t* table = (is_col ? p.rel_col : p.rel_row) + head * p.table_stride;
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
      uint32_t x = 0;
      if (word < USED_WORDS)
        for (int e = 0; e < 2; ++e)
          x |= table_number(table, is_col, channel_of(thread.t, word) + e, 8 * part + thread.g) << 16 * e;
      store_shared1(to + table_at(is_col, part, thread.lane) + 4 * word, x);
    }
  }
}

// d = queries times a table: a thread has the offsets 8 part + 2t and 8 part + 2t + 1 of the queries g and g + 8.
DEV void multiply_table(float (&d)[4], const Rows& queries, uint32_t tables, int is_col, int part, int lane) {
  d[0] = d[1] = d[2] = d[3] = 0.f;
  if (!HAS_REL) return;
  uint32_t table[WORDS];
  const uint32_t at = tables + table_at(is_col, part, lane);
#pragma unroll
  for (int i = 0; i < WORDS / 4; ++i) {
    const uint4 four = load_shared4(at + 16 * i);
    table[4 * i] = four.x, table[4 * i + 1] = four.y, table[4 * i + 2] = four.z, table[4 * i + 3] = four.w;
  }
  if (WORDS == 2) {
    const uint2 two = load_shared2(at);
    table[0] = two.x, table[1] = two.y;
  }
  // At depth 64 whole steps belong to one of the tables.
  if (DEPTH == 64)
    multiply(d, queries, table, is_col ? STEPS / 2 : 0, is_col ? STEPS : STEPS / 2);
  else
    multiply(d, queries, table);
}

// --- Terms of a tile of queries: what S begins with. A warp spreads its queries' terms by offset into strips in
// shared memory that are -infinity beside the window. Read by key, they are -infinity for keys out of the window.
constexpr int ROW_STRIP = round_up(LIVE_ROWS > 8 * OFFSET_PARTS + HALF_ROWS - 1 ? LIVE_ROWS : 8 * OFFSET_PARTS + HALF_ROWS - 1, 4);
constexpr int COL_STRIP =
    round_up(8 * HALO_PARTS > 8 * OFFSET_PARTS + TILE_COLS - 1 ? 8 * HALO_PARTS : 8 * OFFSET_PARTS + TILE_COLS - 1, 4);
constexpr int STRIPS = 16 * (ROW_STRIP + COL_STRIP) * 4;   // bytes of a warp

// Where a thread writes and reads its queries' terms, those of the upper query; the lower one is 8 strips further.
struct Strips {
  uint32_t row_to, col_to, row_from, col_from;

  DEV Strips(uint32_t strips, const Thread& thread) {
    for (int i = thread.lane; i < STRIPS / 4; i += 32) store_shared1(strips + 4 * i, as_bits(-infinite()));
    row_from = strips + thread.g * ROW_STRIP * 4;
    col_from = strips + (16 * ROW_STRIP + thread.g * COL_STRIP + 2 * thread.t) * 4;
    row_to = whole(row_from + (2 * thread.t + thread.row) * 4);
    col_to = whole(col_from + thread.col * 4);
    row_from = whole(row_from);
    col_from = whole(col_from);
  }
};

struct Terms {
  float row[2][LIVE_ROWS], col[2][2 * HALO_PARTS];

  // first_row and first_col are the thread's upper query in its phase of the map.
  DEV void compute(const Rows& queries, uint32_t tables, const Strips& strips, const Thread& thread, const Piece& piece,
                   int first_row, int first_col) {
#pragma unroll
    for (int part = 0; part < OFFSET_PARTS; ++part) {
      float x[4], y[4];
      multiply_table(x, queries, tables, 0, part, thread.lane);
      multiply_table(y, queries, tables, 1, part, thread.lane);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int offset = 8 * part + 2 * thread.t + e;
        const bool outside = 8 * part + 7 >= WINDOW && offset >= WINDOW;
        const int key_col = first_col + offset - RADIUS;
        const bool col_outside = outside || (MASK_BORDER && (key_col < 0 || key_col >= piece.width));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key_row = first_row + half * HALF_ROWS + offset - RADIUS;
          const bool row_outside = outside || (MASK_BORDER && (key_row < 0 || key_row >= piece.height));
          store_shared1(strips.row_to + (half * 8 * ROW_STRIP + 8 * part + e) * 4, as_bits(row_outside ? -infinite() : x[2 * half + e]));
          store_shared1(strips.col_to + (half * 8 * COL_STRIP + 8 * part + e) * 4, as_bits(col_outside ? -infinite() : y[2 * half + e]));
        }
      }
    }
    meet_warp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < LIVE_ROWS; i += 4) {
        const uint4 four = load_shared4(strips.row_from + (half * 8 * ROW_STRIP + i) * 4);
        const uint32_t x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (i + e < LIVE_ROWS) row[half][i + e < LIVE_ROWS ? i + e : 0] = as_float(x[e]);
      }
#pragma unroll
      for (int part = 0; part < HALO_PARTS; ++part) {
        const uint2 two = load_shared2(strips.col_from + (half * 8 * COL_STRIP + 8 * part) * 4);
        col[half][2 * part] = as_float(two.x);
        col[half][2 * part + 1] = as_float(two.y);
      }
    }
  }
  // What a product's accumulators begin with; those of dead halves are never read.
  DEV void begin(float (&s)[4], int product) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool live = is_live(half, product);
      const int i = live ? row_of(product) - half * HALF_ROWS : 0;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        s[2 * half + e] = live ? row[half][i] + col[half][2 * part_of(product) + e] : anything();
    }
  }
};
