// Packed rows of one head: how they are laid out, how they come out of a map and go back, and how they are
// prefetched. Strides, memory formats, types, dilation and borders end here.
#pragma once
#include "vectors.h"

namespace sasa {
namespace {

// Query rows that are computed together. In the backward they begin at multiples of it: what three rows add to
// dK and dV is summed first, and no sum may depend on where a band begins.
constexpr int QUERY_ROWS = 3;
// Rows of K and V for which buffers on the stack are made: those of the largest window, up to whole threes.
constexpr int64_t MAX_KV_ROWS = LARGEST_KERNEL + 2 * QUERY_ROWS;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A packed row: depth channels, each `margin` zeros, `padded_width` pixels, and again `margin` zeros.
template <typename T>
struct Layout {
  int64_t k, radius, depth;  // edge of the window, k / 2, channels of a head
  int64_t height, width;   // of the phase
  int64_t margin, padded_width;
  int64_t stride;  // from one channel to the next, in elements

  Layout(const Problem& p, int64_t phase_row, int64_t phase_col)
      : k(p.kernel_size),
        radius(p.kernel_size / 2),
        depth(p.depth),
        height(size_at_phase(p, p.height, phase_row)),
        width(size_at_phase(p, p.width, phase_col)),
        margin(round_up(radius, Vector<T>::lanes)),
        padded_width(round_up(width, Vector<T>::lanes)),
        // An odd number of vectors, so that one pixel's channels fall into different sets of the cache.
        stride(margin + padded_width + margin + (padded_width / Vector<T>::lanes % 2 ? 0 : Vector<T>::lanes)) {}

  int64_t row_size() const { return depth * stride; }         // elements of a packed row
  int64_t window_row_size() const { return k * k * stride; }  // elements of a row of P or dS: k * k for a query
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
  RowRange(const Layout<T>& layout, int64_t y, int64_t rows) : top(y - layout.radius) {
    const int64_t below = layout.height - top, all = layout.k + rows - 1;
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
inline int64_t map_offset(const Map& map, const Problem& p, const Band& band, int64_t y) {
  return band.image * map.batch + band.head * p.depth * map.channel +
         (band.phase_row + y * p.dilation) * map.row + band.phase_col * map.col;
}

// Call a function with some rows of a map and the same rows of a ring. In channels_last it is `whole_row`, with
// all channels of a row, else `channel_row`, with one channel of a row. Channels are the outer loop then, as a
// map's rows of one channel are adjacent.
template <typename S, typename T, typename WholeRow, typename ChannelRow>
inline void for_each_row(const Map& map, const Problem& p, const Layout<T>& layout, const Band& band,
                         int64_t y, int64_t rows, const Ring<T>& ring, const WholeRow& whole_row,
                         const ChannelRow& channel_row) {
  S* first = static_cast<S*>(map.data) + map_offset(map, p, band, y);
  const int64_t pixel_step = map.col * p.dilation, row_step = map.row * p.dilation;
  T* packed[MAX_KV_ROWS];
  ring.row_pointers(y, rows, layout.margin, packed);
  if (map.channel == 1 && pixel_step != 1) {
    for (int64_t r = 0; r < rows; ++r) whole_row(first + r * row_step, packed[r], pixel_step);
    return;
  }
  for (int64_t c = 0; c < p.depth; ++c)
    for (int64_t r = 0; r < rows; ++r)
      channel_row(first + c * map.channel + r * row_step, packed[r] + c * layout.stride, pixel_step);
}

template <typename S, typename T>
void pack_as(const Map& map, const Problem& p, const Layout<T>& layout, const Band& band, int64_t y,
             int64_t rows, T factor, const Ring<T>& to) {
  for_each_row<S>(
      map, p, layout, band, y, rows, to,
      [&](const S* row, T* packed, int64_t pixel_step) {
        transpose_in(row, pixel_step, layout.width, p.depth, factor, packed, layout.stride);
      },
      [&](const S* row, T* packed, int64_t pixel_step) {
        if (pixel_step == 1) return copy_row(row, layout.width, factor, packed);
        for (int64_t x = 0; x < layout.width; ++x) {
          T value;
          widen(value, row[x * pixel_step]);
          packed[x] = value * factor;
        }
      });
}

template <typename S, typename T>
void unpack_as(const Map& map, const Problem& p, const Layout<T>& layout, const Band& band, int64_t y,
               int64_t rows, T factor, const Ring<T>& from) {
  for_each_row<S>(
      map, p, layout, band, y, rows, from,
      [&](S* row, const T* packed, int64_t pixel_step) {
        transpose_out(packed, layout.stride, layout.width, p.depth, factor, row, pixel_step);
      },
      [&](S* row, const T* packed, int64_t pixel_step) {
        if (sizeof(S) == sizeof(T) && pixel_step == 1)
          return copy_row(packed, layout.width, factor, reinterpret_cast<T*>(row));
        for (int64_t x = 0; x < layout.width; ++x) narrow(row[x * pixel_step], packed[x] * factor);
      });
}

// Copy rows y to y + rows of a map into a ring, times a factor, or back.
inline void pack(const Map& map, const Problem& p, const Layout<double>& layout, const Band& band, int64_t y,
                 int64_t rows, double factor, const Ring<double>& to) {
  pack_as<double>(map, p, layout, band, y, rows, factor, to);
}
inline void pack(const Map& map, const Problem& p, const Layout<float>& layout, const Band& band, int64_t y,
                 int64_t rows, float factor, const Ring<float>& to) {
  if (p.type == Type::Float) pack_as<float>(map, p, layout, band, y, rows, factor, to);
  if (p.type == Type::BFloat16) pack_as<BFloat16>(map, p, layout, band, y, rows, factor, to);
  if (p.type == Type::Half) pack_as<Half>(map, p, layout, band, y, rows, factor, to);
}
inline void unpack(const Map& map, const Problem& p, const Layout<double>& layout, const Band& band, int64_t y,
                   int64_t rows, double factor, const Ring<double>& from) {
  unpack_as<double>(map, p, layout, band, y, rows, factor, from);
}
inline void unpack(const Map& map, const Problem& p, const Layout<float>& layout, const Band& band, int64_t y,
                   int64_t rows, float factor, const Ring<float>& from) {
  if (p.type == Type::Float) unpack_as<float>(map, p, layout, band, y, rows, factor, from);
  if (p.type == Type::BFloat16) unpack_as<BFloat16>(map, p, layout, band, y, rows, factor, from);
  if (p.type == Type::Half) unpack_as<Half>(map, p, layout, band, y, rows, factor, from);
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

  void add(const Map& map, int64_t y, int64_t rows) {
    const int64_t size = p.type == Type::Double ? 8 : p.type == Type::Float ? 4 : 2;
    if (!map.data || rows <= 0 || map.col != 1 || map.row != p.width || p.dilation != 1) return;
    const int64_t lines = (rows * p.width * size + Cursor::LINE - 1) / Cursor::LINE;
    const char* first = static_cast<const char*>(map.data) + map_offset(map, p, band, y) * size;
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
