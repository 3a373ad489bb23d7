// Rows of one head of a map, packed: in the compute type, a channel after the other, with margins of zeros.
// Strides, layouts, types, dilation and borders end here.

#include "vectors.h"

namespace sasa {
namespace {

// Rows of queries that advance together. In the backward such groups begin at multiples of it: what the rows of a group
// spread is summed before it is added, and no sum may depend on where a band begins.
constexpr int GROUP = 3;
// Rows that stack buffers are made for: at least those that the windows of a group span, up to whole groups.
constexpr int64_t LARGEST_SPAN = LARGEST_KERNEL + 2 * GROUP;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <typename T>
struct Layout {
  int64_t k, radius, depth;
  int64_t height, width;   // of the phase
  int64_t margin, padded, stride;  // of a packed row, in elements

  Layout(const Problem& p, int64_t phase_row, int64_t phase_col)
      : k(p.kernel_size),
        radius(p.kernel_size / 2),
        depth(p.depth),
        height(at_phase(p, p.height, phase_row)),
        width(at_phase(p, p.width, phase_col)),
        margin(round_up(radius, Vector<T>::lanes)),
        padded(round_up(width, Vector<T>::lanes)),
        // Odd in vectors, so that a column of channels spreads over the sets of a cache.
        stride(margin + padded + margin + (padded / Vector<T>::lanes % 2 ? 0 : Vector<T>::lanes)) {}

  int64_t map_row() const { return depth * stride; }   // one packed row of all channels
  int64_t pair_row() const { return k * k * stride; }  // one row of weights, all k * k of them
};

template <typename T>
struct Scratch {
  T* next;
  T* take(int64_t elements) {
    T* taken = next;
    next += round_up(elements, Vector<T>::lanes);
    return taken;
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
  store(to + n - L, load(from + n - L) * factor);  // the rest, some of it twice
}

typedef float Quad __attribute__((vector_size(16)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Four{__VA_ARGS__}))
#endif

// to[c][x] = from[x][c] * factor for 4 by 4 of them, rows apart by the steps.
inline void transpose_quad(const float* from, int64_t from_step, float factor, float* to,
                           int64_t to_step) {
  typedef int32_t Four __attribute__((vector_size(16), unused));
  Quad in[4];
  for (int n = 0; n < 4; ++n)
    in[n] = *reinterpret_cast<const LooseQuad*>(from + n * from_step) * factor;
  const Quad a = SHUFFLE(in[0], in[1], 0, 4, 1, 5), b = SHUFFLE(in[0], in[1], 2, 6, 3, 7);
  const Quad c = SHUFFLE(in[2], in[3], 0, 4, 1, 5), d = SHUFFLE(in[2], in[3], 2, 6, 3, 7);
  const Quad out[4] = {SHUFFLE(a, c, 0, 1, 4, 5), SHUFFLE(a, c, 2, 3, 6, 7),
                       SHUFFLE(b, d, 0, 1, 4, 5), SHUFFLE(b, d, 2, 3, 6, 7)};
  for (int n = 0; n < 4; ++n) *reinterpret_cast<LooseQuad*>(to + n * to_step) = out[n];
}
#undef SHUFFLE

// to[c][x] = from[x][c] * factor: a row of pixels whose channels lie together.
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

// to[x][c] = from[c][x] * factor.
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

// A ring of packed rows; row y >= 0 stays in it until row y + rows is asked for.
template <typename T>
struct Ring {
  T* data;
  int64_t rows, row_size;
  T* row(int64_t y) const { return data + y % rows * row_size; }

  // Where some rows from y on are, at an offset into each.
  template <typename Pointer>
  void point(int64_t y, int64_t count, int64_t offset, Pointer* to) const {
    for (int64_t n = 0; n < count; ++n) to[n] = row(y + n) + offset;
  }
};

// Where the first channel of row y of a band is in a map, in elements.
inline int64_t place(const Map& map, const Problem& p, const Band& band, int64_t y) {
  return band.image * map.batch + band.head * p.depth * map.channel +
         (band.phase_row + y * p.dilation) * map.row + band.phase_col * map.col;
}

// Call a function with some rows of a map and the same rows of a ring: `pixels` with a whole row, where the
// channels of a pixel lie together, else `channel` with a row of each channel, its pixels a step apart. Row by
// row of each channel, as rows of a channel lie together in most maps.
template <typename S, typename T, typename Pixels, typename Channel>
inline void each_row(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y,
                     int64_t rows, const Ring<T>& ring, const Pixels& pixels, const Channel& channel) {
  S* first = static_cast<S*>(map.data) + place(map, p, band, y);
  const int64_t step = map.col * p.dilation, down = map.row * p.dilation;
  T* packed[LARGEST_SPAN];
  ring.point(y, rows, at.margin, packed);
  if (map.channel == 1 && step != 1) {
    for (int64_t r = 0; r < rows; ++r) pixels(first + r * down, packed[r], step);
    return;
  }
  for (int64_t c = 0; c < p.depth; ++c)
    for (int64_t r = 0; r < rows; ++r)
      channel(first + c * map.channel + r * down, packed[r] + c * at.stride, step);
}

template <typename S, typename T>
void pack_as(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y, int64_t rows,
             T factor, const Ring<T>& to) {
  each_row<S>(
      map, p, at, band, y, rows, to,
      [&](const S* row, T* packed, int64_t step) {
        transpose_in(row, step, at.width, p.depth, factor, packed, at.stride);
      },
      [&](const S* row, T* packed, int64_t step) {
        if (step == 1) return copy_row(row, at.width, factor, packed);
        for (int64_t x = 0; x < at.width; ++x) {
          T value;
          widen(value, row[x * step]);
          packed[x] = value * factor;
        }
      });
}

template <typename S, typename T>
void unpack_as(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y, int64_t rows,
               T factor, const Ring<T>& from) {
  each_row<S>(
      map, p, at, band, y, rows, from,
      [&](S* row, const T* packed, int64_t step) {
        transpose_out(packed, at.stride, at.width, p.depth, factor, row, step);
      },
      [&](S* row, const T* packed, int64_t step) {
        if (sizeof(S) == sizeof(T) && step == 1)
          return copy_row(packed, at.width, factor, reinterpret_cast<T*>(row));
        for (int64_t x = 0; x < at.width; ++x) narrow(row[x * step], packed[x] * factor);
      });
}

inline void pack(const Map& map, const Problem& p, const Layout<double>& at, const Band& band, int64_t y,
                 int64_t rows, double factor, const Ring<double>& to) {
  pack_as<double>(map, p, at, band, y, rows, factor, to);
}
inline void pack(const Map& map, const Problem& p, const Layout<float>& at, const Band& band, int64_t y,
                 int64_t rows, float factor, const Ring<float>& to) {
  if (p.type == Type::Float) pack_as<float>(map, p, at, band, y, rows, factor, to);
  if (p.type == Type::BFloat16) pack_as<BFloat16>(map, p, at, band, y, rows, factor, to);
  if (p.type == Type::Half) pack_as<Half>(map, p, at, band, y, rows, factor, to);
}
inline void unpack(const Map& map, const Problem& p, const Layout<double>& at, const Band& band, int64_t y,
                   int64_t rows, double factor, const Ring<double>& from) {
  unpack_as<double>(map, p, at, band, y, rows, factor, from);
}
inline void unpack(const Map& map, const Problem& p, const Layout<float>& at, const Band& band, int64_t y,
                   int64_t rows, float factor, const Ring<float>& from) {
  if (p.type == Type::Float) unpack_as<float>(map, p, at, band, y, rows, factor, from);
  if (p.type == Type::BFloat16) unpack_as<BFloat16>(map, p, at, band, y, rows, factor, from);
  if (p.type == Type::Half) unpack_as<Half>(map, p, at, band, y, rows, factor, from);
}

// Where to go on with bringing lines of a map into the cache: `lines` of each channel, then a jump to the next.
struct Walk {
  static constexpr int64_t LINE = 64;
  const char* next = nullptr;
  int64_t left = 0;  // lines of this channel
  int64_t lines = 0, jump = 0;
  int64_t each = 0;  // lines at a time

  void go_on() {
    for (int64_t n = each; n > 0; --n) {
      __builtin_prefetch(next);
      next += LINE;
      if (--left > 0) continue;
      next += jump;
      left = lines;
    }
  }
};

// Rows of maps that are brought into the cache a few lines at a time, while something else is computed. Only
// where a channel's pixels follow each other: elsewhere what lies between them belongs to others.
class Fetch {
 public:
  Fetch(const Problem& p, const Band& band) : p(p), band(band) {}

  void add(const Map& map, int64_t y, int64_t rows) {
    const int64_t size = p.type == Type::Double ? 8 : p.type == Type::Float ? 4 : 2;
    if (!map.data || rows <= 0 || map.col != 1 || map.row != p.width || p.dilation != 1) return;
    const int64_t lines = (rows * p.width * size + Walk::LINE - 1) / Walk::LINE;
    const char* first = static_cast<const char*>(map.data) + place(map, p, band, y) * size;
    maps[count++] = {first, lines, lines, map.channel * size - lines * Walk::LINE};
    total += p.depth * lines;
  }
  // Spread over so many calls of next(), and for each of them so many of go_on().
  void over(int64_t calls, int64_t steps) {
    each = (total + calls * steps - 1) / (calls * steps);
    per_call = each * steps;
  }
  // What to bring in next.
  Walk& next() {
    if (todo <= 0 && begun < count) {
      walk = maps[begun++];
      walk.each = each;
      todo = p.depth * walk.lines;
    }
    if (todo <= 0) walk.each = 0;
    todo -= per_call;
    return walk;
  }

 private:
  const Problem& p;
  const Band& band;
  Walk maps[4], walk;
  int count = 0, begun = 0;
  int64_t total = 0, each = 0, per_call = 0, todo = 0;
};

}  // namespace
}  // namespace sasa
