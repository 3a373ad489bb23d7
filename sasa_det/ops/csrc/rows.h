// Packed rows of one head: how they are laid out, how they come out of a map and go back, and how they are
// prefetched. Strides, memory formats, types, dilation and borders end here.
#pragma once
#include "vectors.h"

namespace sasa {
namespace {

// Query rows that are computed together. In the backward they begin at multiples of it: what three rows add to
// dK and dV is summed first, and no sum may depend on where a band begins.
constexpr int QUERY_ROWS = 3;
// Rows of K and V for which buffers on the stack are made: those of the largest windows, up to whole threes of each
// remainder of the stride.
constexpr int64_t MAX_KV_ROWS = LARGEST_KERNEL + 5 * LARGEST_STRIDE;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The rows and columns of a map that a band computes with, or its phase.
struct Phase {
  int64_t step;                  // from one of them to the next in the map
  int64_t first_row, first_col;  // in the map
  int64_t height, width;
  int64_t runs;                  // of which a packed row consists

  int64_t run_width(int64_t run) const { return (width - run + runs - 1) / runs; }
};

inline Phase query_phase(const Problem& p, int64_t row, int64_t col) {
  return {p.dilation, row, col, size_at_phase(p, p.height, row), size_at_phase(p, p.width, col), 1};
}
// Of the keys that the queries of a phase see.
inline Phase kv_phase(const Problem& p, int64_t row, int64_t col) {
  const int64_t first_row = row * p.stride % p.dilation, first_col = col * p.stride % p.dilation;
  return {p.dilation * p.kv_step, first_row * p.kv_step, first_col * p.kv_step,
          size_at_phase(p, p.kv_height, first_row), size_at_phase(p, p.kv_width, first_col), p.stride};
}

// A packed row of queries: depth channels, each `margin` zeros, `padded_width` pixels, and again `margin` zeros. One of
// keys or values consists of `kv_stride` such rows, its runs: the columns 0, kv_stride, 2 * kv_stride and so on, then
// those from column 1 on. So what a vector of queries sees at one place of their windows is a vector, too.
template <typename T>
struct Layout {
  int64_t k, radius, depth;  // edge of the window, k / 2, channels of a head
  Phase queries, keys;
  int64_t kv_stride;         // keys from one query to the next
  int64_t kv_row, kv_col;    // of the first query, among the keys
  int64_t margin, padded_width;
  int64_t stride;  // from one channel to the next, in elements

  Layout(const Problem& p, int64_t phase_row, int64_t phase_col)
      : k(p.kernel_size),
        radius(p.kernel_size / 2),
        depth(p.depth),
        queries(query_phase(p, phase_row, phase_col)),
        keys(kv_phase(p, phase_row, phase_col)),
        kv_stride(p.stride),
        kv_row(phase_row * p.stride / p.dilation),
        kv_col(phase_col * p.stride / p.dilation),
        margin(round_up(radius, Vector<T>::lanes)),
        padded_width(round_up(longest_run(queries, keys), Vector<T>::lanes)),
        // An odd number of vectors, so that one pixel's channels fall into different sets of the cache.
        stride(margin + padded_width + margin + (padded_width / Vector<T>::lanes % 2 ? 0 : Vector<T>::lanes)) {}

  int64_t row_size() const { return depth * stride; }           // elements of a packed row of queries
  int64_t kv_row_size() const { return kv_stride * row_size(); }  // of keys
  int64_t window_row_size() const { return k * k * stride; }    // elements of a row of P or dS: k * k for a query

  // Rows of keys from the first to the last in the windows of so many query rows.
  int64_t kv_rows(int64_t rows) const { return k + (rows - 1) * kv_stride; }
  // What a ring holds of them: those of three query rows, and those above that are in no window.
  int64_t ring_rows() const { return kv_rows(QUERY_ROWS) + (kv_stride > k ? kv_stride - k : 0); }
  // The first row of keys in the window of query row y, in the map or above it; and the first column, of query column x.
  int64_t window_top(int64_t y) const { return kv_row + y * kv_stride - radius; }
  int64_t window_left(int64_t x) const { return kv_col + x * kv_stride - radius; }
  // The first query row whose window ends below row v of the keys, and the first whose window begins there or below.
  int64_t first_to_see(int64_t v) const {
    const int64_t below = v - kv_row - radius;
    return below > 0 ? (below + kv_stride - 1) / kv_stride : 0;
  }
  int64_t first_below(int64_t v) const { return (v - kv_row + radius + kv_stride - 1) / kv_stride; }
  // Whether the windows of `count` query columns from x on are in the map, as far as columns go.
  bool are_inside(int64_t x, int64_t count) const {
    return window_left(x) >= 0 && window_left(x + count - 1) + k <= keys.width;
  }
  // Which run of the keys neighbour j is in, and how far it is to the right of its query there.
  int64_t run(int64_t j) const { return (kv_col + j + radius * (kv_stride - 1)) % kv_stride; }
  int64_t shift(int64_t j) const { return (kv_col + j + radius * (kv_stride - 1)) / kv_stride - radius; }

 private:
  static int64_t longest_run(const Phase& queries, const Phase& keys) {
    return keys.run_width(0) > queries.width ? keys.run_width(0) : queries.width;
  }
};

// The neighbours of a row of the window, in the order in which P, S and all that is like them hold them: those in one run
// of the keys, a pixel apart, then those in the next.
struct Neighbours {
  int64_t runs;                          // in which there are neighbours
  int64_t first[LARGEST_STRIDE + 1];     // neighbour of each, and at the end their number
  int64_t columns[LARGEST_STRIDE];       // of the first neighbour, in elements of a packed row from the query's pixel
  int64_t order[LARGEST_KERNEL];         // the neighbour's column in the window
  int64_t shifts[LARGEST_KERNEL];        // pixels from the query to the right, in the run

  template <typename T>
  explicit Neighbours(const Layout<T>& layout) : runs(layout.kv_stride < layout.k ? layout.kv_stride : layout.k) {
    int64_t n = 0;
    for (int64_t run = 0; run < runs; ++run) {
      first[run] = n;
      columns[run] = layout.run(run) * layout.row_size() + layout.shift(run);
      for (int64_t j = run; j < layout.k; j += layout.kv_stride, ++n) order[n] = j, shifts[n] = layout.shift(j);
    }
    first[runs] = n;
  }
  int64_t count(int64_t run) const { return first[run + 1] - first[run]; }
};

// Hands out the scratch memory of a thread, a buffer after the other.
template <typename T>
struct Scratch {
  T* next;
  T* allocate(int64_t elements) {
    T* buffer = next;
    next += round_up(elements, Vector<T>::lanes);
    return buffer;
  }
};

template <typename T>
inline void clear(T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
}

// ---- Packing and unpacking rows of one head. ----

template <typename S, typename T>
inline void copy_row(const S* from, int64_t n, T factor, T* to) {
  for (int64_t x = 0; x < n; ++x) {
    T value;
    widen(value, from[x]);
    to[x] = value * factor;
  }
}
template <typename T>
inline void copy_row(const T* from, int64_t n, T factor, T* to) {
  constexpr int64_t L = Vector<T>::lanes;
  if (n < L) {
    for (int64_t x = 0; x < n; ++x) to[x] = from[x] * factor;
    return;
  }
  for (int64_t x = 0; x + L <= n; x += L) store(to + x, load(from + x) * factor);
  store(to + n - L, load(from + n - L) * factor);  // the rest; some elements are stored twice
}

// Copy the pixels of a row to two runs in turn, and back. Compilers make vectors of this, not of any number of runs.
template <typename S, typename T>
inline void split_row(const S* __restrict from, int64_t width, T factor, T* __restrict to, int64_t run_size) {
  T* __restrict other = to + run_size;
  for (int64_t x = 0; x < width / 2; ++x) {
    T even, odd;
    widen(even, from[2 * x]), widen(odd, from[2 * x + 1]);
    to[x] = even * factor, other[x] = odd * factor;
  }
  if (width % 2 == 0) return;
  T last;
  widen(last, from[width - 1]);
  to[width / 2] = last * factor;
}
template <typename S, typename T>
inline void join_row(const T* __restrict from, int64_t run_size, int64_t width, T factor, S* __restrict to) {
  const T* __restrict other = from + run_size;
  for (int64_t x = 0; x < width / 2; ++x) {
    narrow(to[2 * x], from[x] * factor);
    narrow(to[2 * x + 1], other[x] * factor);
  }
  if (width % 2) narrow(to[width - 1], from[width / 2] * factor);
}

typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Four{__VA_ARGS__}))
#endif

// to[c][x] = from[x][c] * factor for 4 pixels and 4 channels.
inline void transpose_quad(const float* from, int64_t from_step, float factor, float* to,
                           int64_t to_step) {
  typedef int32_t Four __attribute__((vector_size(16), unused));
  Quad in[4];
  for (int n = 0; n < 4; ++n)
    in[n] = *reinterpret_cast<const UnalignedQuad*>(from + n * from_step) * factor;
  const Quad a = SHUFFLE(in[0], in[1], 0, 4, 1, 5), b = SHUFFLE(in[0], in[1], 2, 6, 3, 7);
  const Quad c = SHUFFLE(in[2], in[3], 0, 4, 1, 5), d = SHUFFLE(in[2], in[3], 2, 6, 3, 7);
  const Quad out[4] = {SHUFFLE(a, c, 0, 1, 4, 5), SHUFFLE(a, c, 2, 3, 6, 7),
                       SHUFFLE(b, d, 0, 1, 4, 5), SHUFFLE(b, d, 2, 3, 6, 7)};
  for (int n = 0; n < 4; ++n) *reinterpret_cast<UnalignedQuad*>(to + n * to_step) = out[n];
}
#undef SHUFFLE

// to[c][x] = from[x][c] * factor, for a row of pixels whose channels are adjacent, as in channels_last.
template <typename S, typename T>
inline void transpose_in(const S* from, int64_t step, int64_t width, int64_t depth, T factor, T* to,
                         int64_t stride) {
  int64_t quads = 0, quad_depth = 0;
  if constexpr (sizeof(S) == 4 && sizeof(T) == 4) {
    quads = width / 4 * 4, quad_depth = depth / 4 * 4;
    for (int64_t x = 0; x < quads; x += 4)
      for (int64_t c = 0; c < quad_depth; c += 4)
        transpose_quad(from + x * step + c, step, factor, to + c * stride + x, stride);
  }
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = x < quads ? quad_depth : 0; c < depth; ++c) {
      T value;
      widen(value, from[x * step + c]);
      to[c * stride + x] = value * factor;
    }
}

// to[x][c] = from[c][x] * factor, for such a row.
template <typename S, typename T>
inline void transpose_out(const T* from, int64_t stride, int64_t width, int64_t depth, T factor, S* to,
                          int64_t step) {
  int64_t quads = 0, quad_depth = 0;
  if constexpr (sizeof(S) == 4 && sizeof(T) == 4) {
    quads = width / 4 * 4, quad_depth = depth / 4 * 4;
    for (int64_t x = 0; x < quads; x += 4)
      for (int64_t c = 0; c < quad_depth; c += 4)
        transpose_quad(from + c * stride + x, stride, factor, to + x * step + c, step);
  }
  for (int64_t x = 0; x < width; ++x)
    for (int64_t c = x < quads ? quad_depth : 0; c < depth; ++c)
      narrow(to[x * step + c], from[c * stride + x] * factor);
}

// A ring buffer of packed rows. Row y >= 0 stays in it until row y + rows is written.
template <typename T>
struct Ring {
  T* data;
  int64_t rows, row_size;
  T* row(int64_t y) const { return data + y % rows * row_size; }

  // Pointers to `count` rows from y on, `offset` elements into each.
  template <typename Pointer>
  void row_pointers(int64_t y, int64_t count, int64_t offset, Pointer* to) const {
    for (int64_t n = 0; n < count; ++n) to[n] = row(y + n) + offset;
  }
};

// The rows of K and V in the windows of some query rows, counted from `top`. Those in [begin, end) are in the
// map.
struct RowRange {
  int64_t top, begin, end;

  template <typename T>
  RowRange(const Layout<T>& layout, int64_t y, int64_t rows) : top(layout.window_top(y)) {
    const int64_t below = layout.keys.height - top, all = layout.kv_rows(rows);
    begin = top < 0 ? -top : 0;
    end = below < all ? below : all;
  }
  bool has(int64_t u) const { return u >= begin && u < end; }

  // Pointers to those in the map.
  template <typename T>
  void row_pointers(const Ring<T>& ring, const T** to) const {
    ring.row_pointers(top + begin, end - begin, 0, to + begin);
  }
};

// Offset in a map of the first channel and pixel of row y of a band's phase, in elements.
inline int64_t map_offset(const Map& map, const Phase& phase, const Problem& p, const Band& band, int64_t y) {
  return band.image * map.batch + band.head * p.depth * map.channel +
         (phase.first_row + y * phase.step) * map.row + phase.first_col * map.col;
}

// Call a function with some rows of a map and the same rows of a ring. In channels_last it is `whole_row`, with all
// channels of a run and how many pixels it has, else `channel_row`, with all runs of one channel. Channels are the outer
// loop then, as a map's rows of one channel are adjacent.
template <typename S, typename T, typename WholeRow, typename ChannelRow>
inline void for_each_row(const Map& map, const Phase& phase, const Problem& p, const Layout<T>& layout,
                         const Band& band, int64_t y, int64_t rows, const Ring<T>& ring, const WholeRow& whole_row,
                         const ChannelRow& channel_row) {
  S* first = static_cast<S*>(map.data) + map_offset(map, phase, p, band, y);
  const int64_t col_step = map.col * phase.step, row_step = map.row * phase.step;
  T* packed[MAX_KV_ROWS];
  ring.row_pointers(y, rows, layout.margin, packed);
  if (map.channel == 1 && col_step != 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t run = 0; run < phase.runs; ++run)
        whole_row(first + r * row_step + run * col_step, packed[r] + run * layout.row_size(), col_step * phase.runs,
                  phase.run_width(run));
    return;
  }
  for (int64_t c = 0; c < p.depth; ++c)
    for (int64_t r = 0; r < rows; ++r)
      channel_row(first + c * map.channel + r * row_step, packed[r] + c * layout.stride, col_step);
}

template <typename S, typename T>
void pack_as(const Map& map, const Phase& phase, const Problem& p, const Layout<T>& layout, const Band& band,
             int64_t y, int64_t rows, T factor, const Ring<T>& to) {
  for_each_row<S>(
      map, phase, p, layout, band, y, rows, to,
      [&](const S* row, T* packed, int64_t pixel_step, int64_t width) {
        transpose_in(row, pixel_step, width, p.depth, factor, packed, layout.stride);
      },
      [&](const S* row, T* packed, int64_t col_step) {
        if (col_step == 1 && phase.runs == 1) return copy_row(row, phase.width, factor, packed);
        if (col_step == 1 && phase.runs == 2) return split_row(row, phase.width, factor, packed, layout.row_size());
        for (int64_t run = 0; run < phase.runs; ++run)
          for (int64_t x = 0; x < phase.run_width(run); ++x) {
            T value;
            widen(value, row[(x * phase.runs + run) * col_step]);
            packed[run * layout.row_size() + x] = value * factor;
          }
      });
}

template <typename S, typename T>
void unpack_as(const Map& map, const Phase& phase, const Problem& p, const Layout<T>& layout, const Band& band,
               int64_t y, int64_t rows, T factor, const Ring<T>& from) {
  for_each_row<S>(
      map, phase, p, layout, band, y, rows, from,
      [&](S* row, const T* packed, int64_t pixel_step, int64_t width) {
        transpose_out(packed, layout.stride, width, p.depth, factor, row, pixel_step);
      },
      [&](S* row, const T* packed, int64_t col_step) {
        if (sizeof(S) == sizeof(T) && col_step == 1 && phase.runs == 1)
          return copy_row(packed, phase.width, factor, reinterpret_cast<T*>(row));
        if (col_step == 1 && phase.runs == 2) return join_row(packed, layout.row_size(), phase.width, factor, row);
        for (int64_t run = 0; run < phase.runs; ++run)
          for (int64_t x = 0; x < phase.run_width(run); ++x)
            narrow(row[(x * phase.runs + run) * col_step], packed[run * layout.row_size() + x] * factor);
      });
}

// Copy rows y to y + rows of a map's phase into a ring, times a factor, or back.
inline void pack(const Map& map, const Phase& phase, const Problem& p, const Layout<double>& layout, const Band& band,
                 int64_t y, int64_t rows, double factor, const Ring<double>& to) {
  pack_as<double>(map, phase, p, layout, band, y, rows, factor, to);
}
inline void pack(const Map& map, const Phase& phase, const Problem& p, const Layout<float>& layout, const Band& band,
                 int64_t y, int64_t rows, float factor, const Ring<float>& to) {
  if (p.type == Type::Float) pack_as<float>(map, phase, p, layout, band, y, rows, factor, to);
  if (p.type == Type::BFloat16) pack_as<BFloat16>(map, phase, p, layout, band, y, rows, factor, to);
  if (p.type == Type::Half) pack_as<Half>(map, phase, p, layout, band, y, rows, factor, to);
}
inline void unpack(const Map& map, const Phase& phase, const Problem& p, const Layout<double>& layout,
                   const Band& band, int64_t y, int64_t rows, double factor, const Ring<double>& from) {
  unpack_as<double>(map, phase, p, layout, band, y, rows, factor, from);
}
inline void unpack(const Map& map, const Phase& phase, const Problem& p, const Layout<float>& layout,
                   const Band& band, int64_t y, int64_t rows, float factor, const Ring<float>& from) {
  if (p.type == Type::Float) unpack_as<float>(map, phase, p, layout, band, y, rows, factor, from);
  if (p.type == Type::BFloat16) unpack_as<BFloat16>(map, phase, p, layout, band, y, rows, factor, from);
  if (p.type == Type::Half) unpack_as<Half>(map, phase, p, layout, band, y, rows, factor, from);
}

// Prefetches rows of maps a few cache lines at a time, while something else is computed. It takes only maps in
// which a channel's pixels are adjacent. In others most of a cache line is not needed yet.
class Prefetcher {
 public:
  // Position in one map: the `lines` cache lines of a channel, then those of the next channel. It is small, so
  // that a loop can keep a copy in registers.
  struct Cursor {
    static constexpr int64_t LINE = 64;
    const char* next = nullptr;
    int64_t left = 0;  // lines of this channel
    int64_t lines = 0, jump = 0;
    int64_t per_step = 0;  // lines

    void step() {
      for (int64_t n = per_step; n > 0; --n) {
        __builtin_prefetch(next);
        next += LINE;
        if (--left > 0) continue;
        next += jump;
        left = lines;
      }
    }
  };

  Prefetcher(const Problem& p, const Band& band) : p(p), band(band) {}

  void add(const Map& map, const Phase& phase, int64_t y, int64_t rows) {
    const int64_t size = p.type == Type::Double ? 8 : p.type == Type::Float ? 4 : 2;
    if (!map.data || rows <= 0 || map.col != 1 || map.row != phase.width || phase.step != 1) return;
    const int64_t lines = (rows * phase.width * size + Cursor::LINE - 1) / Cursor::LINE;
    const char* first = static_cast<const char*>(map.data) + map_offset(map, phase, p, band, y) * size;
    maps[count++] = {first, lines, lines, map.channel * size - lines * Cursor::LINE};
    total += p.depth * lines;
  }
  // Divide the lines of all maps among `calls` calls of next(), and each call's among `steps` of step().
  void schedule(int64_t calls, int64_t steps) {
    per_step = (total + calls * steps - 1) / (calls * steps);
    per_call = per_step * steps;
  }
  // The cursor for the next `steps` steps. It goes to the next map only between two calls.
  Cursor& next() {
    if (todo <= 0 && begun < count) {
      cursor = maps[begun++];
      cursor.per_step = per_step;
      todo = p.depth * cursor.lines;
    }
    if (todo <= 0) cursor.per_step = 0;
    todo -= per_call;
    return cursor;
  }

 private:
  const Problem& p;
  const Band& band;
  Cursor maps[4], cursor;
  int count = 0, begun = 0;
  int64_t total = 0, per_step = 0, per_call = 0, todo = 0;  // lines
};

}  // namespace
}  // namespace sasa
