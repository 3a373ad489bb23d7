// The kernels themselves, included by one file for each CPU capability, which sets VECTOR_BYTES and
// CAPABILITY. Everything is in an unnamed namespace: see problem.h for why.
//
// A band is streamed row by row. The k rows of keys and values that a row of queries sees lie packed in
// a ring, one vector of neighbouring pixels after the other, in the compute type and with a margin of
// zeros, so that strides, layouts, types, dilation and borders end where packing ends. All loops over
// pixels are whole vectors; lanes past the last pixel compute on zeros and are not stored.
//
// Loads limit these loops, not products: a window's shifted vectors are unaligned and each counts twice.
// So GROUP rows of queries advance together and every vector of a key or a value serves all of them.
//
// No sum runs over more than one thread or depends on how a map is cut into bands: the same input gives
// the same bits at any thread count.

namespace sasa {
namespace {

// Logits are in units of log 2, since powers of two are what a processor can make: queries are packed
// times log2(e), and what they are summed up into is multiplied by log(2).
constexpr double LOG2_E = 1.44269504088896340736;
constexpr double LN_2 = 0.693147180559945309417;

// Rows of queries, or of keys in the backward, that advance together.
constexpr int GROUP = 3;
// Neighbours in a row, and channels, of which GROUP times as many sums stay in registers.
constexpr int MAX_NEIGHBOURS = VECTOR_REGISTERS >= 32 ? 9 : 4;
constexpr int MAX_CHANNELS = VECTOR_REGISTERS >= 32 ? 8 : 4;

template <typename T>
struct Vector {
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  // Unaligned, and allowed to alias the scalars that it is loaded from.
  typedef T loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
using Vec = typename Vector<T>::type;

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::loose*>(p);
}

// Load once for several uses: left to itself, GCC folds the load into each product that uses it.
template <typename T>
inline Vec<T> load_once(const T* p) {
  Vec<T> x = load(p);
#if defined(__x86_64__) && !defined(__clang__)
  asm("" : "+v"(x));
#endif
  return x;
}

template <typename T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Vector<T>::loose*>(p) = x;
}

template <typename T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

template <typename T>
inline T sum_lanes(Vec<T> x) {
  T lanes[Vector<T>::lanes];
  store(lanes, x);
  for (int half = Vector<T>::lanes / 2; half > 0; half /= 2)
    for (int n = 0; n < half; ++n) lanes[n] += lanes[n + half];
  return lanes[0];
}

// 2^x for x of at most some 120; 0 where the result would not be a normal number. NaN stays NaN.
// A polynomial of least relative error, 1e-7, for the fraction, and the rest into the exponent, in unsigned
// integers since NaN may overflow.
inline Vec<float> exp2_vec(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  const auto magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x + magic;
  const Vec<float> r = x - (shifted - magic);
  Vec<float> y = splat<float>(1.32647272e-3f);
  y = y * r + 9.67151264e-3f;
  y = y * r + 5.55073374e-2f;
  y = y * r + 2.40222421e-1f;
  y = y * r + 6.93146978e-1f;
  y = y * r + 1.0f;
  return x < splat<float>(-126.0f) ? splat<float>(0) : (Vec<float>)((Bits)y + ((Bits)shifted << 23));
}

inline Vec<double> exp2_vec(Vec<double> x) {
  typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  const auto magic = splat<double>(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> shifted = x + magic;
  const Vec<double> r = (x - (shifted - magic)) * LN_2;
  Vec<double> y = splat<double>(1.0 / 6227020800.0);  // Taylor to r^13: |r| <= 0.35, error 1e-17
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = y * (r * r) + r + 1.0;
  return x < splat<double>(-1022.0) ? splat<double>(0) : (Vec<double>)((Bits)y + ((Bits)shifted << 52));
}

// log of normal numbers; NaN stays NaN. Cephes' logf.
inline Vec<float> log_vec(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  const Int bits = (Int)x - 0x3f3504f3;  // sqrt(1/2): the mantissa becomes sqrt(1/2) to sqrt(2)
  const Int exponent = bits >> 23;
  const Vec<float> m = (Vec<float>)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec<float> y = splat<float>(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const Vec<float> result = m + m * m * (y * m - 0.5f) +
                            __builtin_convertvector(exponent, Vec<float>) * 6.93147181e-1f;
  return x != x ? x : result;
}

inline Vec<double> log_vec(Vec<double> x) {
  for (int n = 0; n < Vector<double>::lanes; ++n) x[n] = __builtin_log(x[n]);
  return x;
}

// ---- Storage types. ----

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline void widen(float& to, float from) { to = from; }
inline void widen(double& to, double from) { to = from; }
inline void widen(float& to, BFloat16 from) { to = from_bits(uint32_t(from.bits) << 16); }
inline void widen(float& to, Half from) {
  // Exponent and mantissa in their new place, then rebased by a product, which is right for
  // subnormals as well; infinity and NaN keep an exponent of all ones.
  const uint32_t magnitude = uint32_t(from.bits & 0x7fff) << 13;
  float x = from_bits(magnitude) * 0x1p112f;
  if (magnitude >= 0x0f800000) x = from_bits(magnitude | 0x7f800000);
  to = from_bits(to_bits(x) | (uint32_t(from.bits & 0x8000) << 16));
}

inline void narrow(float& to, float from) { to = from; }
inline void narrow(double& to, double from) { to = from; }
inline void narrow(BFloat16& to, float from) {
  const uint32_t bits = to_bits(from);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  to.bits = from != from ? uint16_t(0x7fc0) : uint16_t(rounded);
}
inline void narrow(Half& to, float from) {
  const uint32_t bits = to_bits(from);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves it in the low bits, rounded
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = uint16_t(sign | half);
}

// ---- Geometry of the scratch. ----

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
        height((p.height - phase_row + p.dilation - 1) / p.dilation),
        width((p.width - phase_col + p.dilation - 1) / p.dilation),
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

// ---- Packing and unpacking one row of one head. ----

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

template <typename S, typename T>
void pack_as(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y,
             T factor, T* to) {
  const S* from = static_cast<const S*>(map.data) + band.image * map.batch +
                  band.head * p.depth * map.channel +
                  (band.phase_row + y * p.dilation) * map.row + band.phase_col * map.col;
  const int64_t step = map.col * p.dilation;
  to += at.margin;
  if (map.channel == 1 && step != 1)
    return transpose_in(from, step, at.width, p.depth, factor, to, at.stride);
  for (int64_t c = 0; c < p.depth; ++c) {
    const S* row = from + c * map.channel;
    T* out = to + c * at.stride;
    if (step == 1) {
      copy_row(row, at.width, factor, out);
    } else {
      for (int64_t x = 0; x < at.width; ++x) {
        T value;
        widen(value, row[x * step]);
        out[x] = value * factor;
      }
    }
  }
}

template <typename S, typename T>
void unpack_as(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y,
               T factor, const T* from) {
  S* to = static_cast<S*>(map.data) + band.image * map.batch + band.head * p.depth * map.channel +
          (band.phase_row + y * p.dilation) * map.row + band.phase_col * map.col;
  const int64_t step = map.col * p.dilation;
  from += at.margin;
  if (map.channel == 1 && step != 1)
    return transpose_out(from, at.stride, at.width, p.depth, factor, to, step);
  for (int64_t c = 0; c < p.depth; ++c) {
    S* row = to + c * map.channel;
    if (sizeof(S) == sizeof(T) && step == 1) {
      copy_row(from + c * at.stride, at.width, factor, reinterpret_cast<T*>(row));
      continue;
    }
    for (int64_t x = 0; x < at.width; ++x) narrow(row[x * step], from[c * at.stride + x] * factor);
  }
}

inline void pack(const Map& map, const Problem& p, const Layout<double>& at, const Band& band,
                 int64_t y, double factor, double* to) {
  pack_as<double>(map, p, at, band, y, factor, to);
}
inline void pack(const Map& map, const Problem& p, const Layout<float>& at, const Band& band,
                 int64_t y, float factor, float* to) {
  if (p.type == Type::Float) pack_as<float>(map, p, at, band, y, factor, to);
  if (p.type == Type::BFloat16) pack_as<BFloat16>(map, p, at, band, y, factor, to);
  if (p.type == Type::Half) pack_as<Half>(map, p, at, band, y, factor, to);
}
inline void unpack(const Map& map, const Problem& p, const Layout<double>& at, const Band& band,
                   int64_t y, double factor, const double* from) {
  unpack_as<double>(map, p, at, band, y, factor, from);
}
inline void unpack(const Map& map, const Problem& p, const Layout<float>& at, const Band& band,
                   int64_t y, float factor, const float* from) {
  if (p.type == Type::Float) unpack_as<float>(map, p, at, band, y, factor, from);
  if (p.type == Type::BFloat16) unpack_as<BFloat16>(map, p, at, band, y, factor, from);
  if (p.type == Type::Half) unpack_as<Half>(map, p, at, band, y, factor, from);
}

// A ring of packed rows; row y >= 0 stays in it until row y + rows is asked for.
template <typename T>
struct Ring {
  T* data;
  int64_t rows, row_size;
  T* row(int64_t y) const { return data + y % rows * row_size; }
};

// Rows that a group and its windows span, and by how many more the keys' groups may lag behind: they begin
// with the band, a multiple of TABLE_ROWS, and the queries' a radius above it, or with the map.
inline int64_t span(int64_t k) { return k + GROUP - 1; }
inline int64_t lagging_span(int64_t k) { return span(k) + (k / 2 % GROUP || k / 2 >= TABLE_ROWS ? GROUP - 1 : 0); }

// ---- Products. ----

// Fetch what the next row of a window will read of this channel: rows and channels lie too far apart for
// the hardware to see the pattern, and are too many to stay in the first cache.
template <typename T>
inline void ahead(const T* p) {
  __builtin_prefetch(p);
  __builtin_prefetch(p + Vector<T>::lanes);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// What logits begin with: the sum of a term of the window's row and one of its column. Window g's begin at
// g * step; it sees the same row of the map one row further up.
template <typename T>
struct Bias {
  const Vec<T>* row;
  const Vec<T>* col;
  int64_t step;

  Vec<T> at(int g, int n) const { return row[g * (step - 1)] + col[g * step + n]; }
};

// out[g * step + n] = bias + sum over c of a[g][c] * b[c] shifted by n pixels, for one vector of pixels.
template <int G, int N, typename T>
__attribute__((noinline)) void dots(const T* const* a, const T* b, const T* soon, int64_t depth,
                                    int64_t stride, const Bias<T>& bias, Vec<T>* out, int64_t step) {
  Vec<T> sum[G][N];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[g][n] = bias.at(g, n);
  for (int64_t c = 0; c < depth; ++c, b += stride, soon += stride) {
    Vec<T> factor[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) factor[g] = load(a[g] + c * stride);
    ahead(soon);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> shifted = load_once(b + n);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sum[g][n] += factor[g] * shifted;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) out[g * step + n] = sum[g][n];
}

// out[n] += sum over c of a[c] * table[c][n].
template <int N, typename T>
inline void table_dots(const T* a, const T* table, int64_t depth, int64_t stride, int64_t k,
                       Vec<T>* out) {
  Vec<T> sum[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t c = 0; c < depth; ++c) {
    const Vec<T> factor = load(a + c * stride);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[n] += factor * table[c * k + n];
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// out[n] += sum over pixels of a * b[n], lane by lane.
template <int N, typename T>
inline void row_dots(const T* a, const T* b, int64_t padded, int64_t stride, Vec<T>* out) {
  Vec<T> sum[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t x = 0; x < padded; x += Vector<T>::lanes) {
    const Vec<T> factor = load(a + x);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[n] += factor * load(b + n * stride + x);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// Call fn with the number of neighbours as a compile-time constant, k at once or in pieces.
template <typename F>
inline void in_pieces(int64_t k, const F& fn) {
  int64_t n = 0;
  if constexpr (MAX_NEIGHBOURS >= 9) {
    if (k == 9) return fn(Count<9>(), n);
    for (; n + 7 <= k; n += 7) fn(Count<7>(), n);
    if (n + 5 <= k) fn(Count<5>(), n), n += 5;
  }
  for (; n + 4 <= k; n += 4) fn(Count<4>(), n);
  switch (k - n) {
    case 3: return fn(Count<3>(), n);
    case 2: return fn(Count<2>(), n);
    case 1: return fn(Count<1>(), n);
  }
}

// Call fn with a number of channels as a compile-time constant.
template <typename F>
inline void by_channels(int64_t depth, const F& fn) {
  int64_t c = 0;
  for (; c + MAX_CHANNELS <= depth; c += MAX_CHANNELS) fn(Count<MAX_CHANNELS>(), c);
  for (; c + 2 <= depth; c += 2) fn(Count<2>(), c);
  for (; c < depth; ++c) fn(Count<1>(), c);
}

// Call fn with the number of rows in a group as a compile-time constant.
template <typename F>
inline void as_group(int64_t rows, const F& fn) {
  static_assert(GROUP == 3, "one case for each number of rows");
  switch (rows) {
    case 3: return fn(Count<3>());
    case 2: return fn(Count<2>());
    case 1: return fn(Count<1>());
  }
}

// What the windows of a group of rows span. Row u of it is row u - g of window g.
template <typename T>
struct Span {
  const T* const* rows;              // [u], null outside of the map
  const T* const (*weights)[GROUP];  // [u][g]
  int64_t k, stride, weight_stride;
};

// Add to sum[g][n] row u of a span, for the windows FIRST to LAST of the group. The shift goes left, and
// the weights go with it, where DIRECTION is -1.
template <int FIRST, int LAST, int DIRECTION, int G, int N, typename T>
inline __attribute__((always_inline)) void add_row(const Span<T>& span, int64_t u, int64_t offset,
                                                   int64_t weight_offset, Vec<T> (&sum)[G][N]) {
  const T* row = span.rows[u];
  if (!row) return;
  row += offset;
  const T* soon = span.rows[u + 1];
  if (soon)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) ahead(soon + offset + (DIRECTION < 0 ? 1 - span.k : 0) + n * span.stride);
  for (int64_t j = 0; j < span.k; ++j) {
    const int64_t weight_place = weight_offset + j * span.weight_stride - (DIRECTION < 0 ? j : 0);
    Vec<T> weight[G];
#pragma GCC unroll 4
    for (int g = FIRST; g <= LAST; ++g) weight[g] = load(span.weights[u][g] + weight_place);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> shifted = load_once(row + n * span.stride + DIRECTION * j);
#pragma GCC unroll 4
      for (int g = FIRST; g <= LAST; ++g) sum[g][n] += weight[g] * shifted;
    }
  }
}

// Sums over the windows of a group, for one vector of pixels and N channels:
// out[g * N + n] = sum over i, j of weights[i + g][g][j] * rows[i + g][n] shifted by j pixels.
template <int G, int N, int DIRECTION, typename T>
__attribute__((noinline)) void window_sums(const Span<T>& span, int64_t offset, int64_t weight_offset,
                                           Vec<T>* out) {
  Vec<T> sum[G][N];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sum[g][n] = Vec<T>{};
  const auto add = [&](auto first, auto last, int64_t u) __attribute__((always_inline)) {
    add_row<first.value, last.value, DIRECTION>(span, u, offset, weight_offset, sum);
  };
  const Count<0> top;
  const Count<1> middle;
  const Count<G - 1> bottom;
  if (span.k < G) {  // windows of one row
    add(top, top, 0);
    if constexpr (G == 3) add(middle, middle, 1);
    if constexpr (G > 1) add(bottom, bottom, G - 1);
  } else {
    if constexpr (G > 1) add(top, top, 0);
    if constexpr (G == 3) add(top, middle, 1);
    for (int64_t u = G - 1; u < span.k; ++u) add(top, bottom, u);
    if constexpr (G == 3) add(middle, bottom, span.k);
    if constexpr (G > 1) add(bottom, bottom, span.k + G - 2);
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) out[g * N + n] = sum[g][n];
}

// ---- Logits of one vector of pixels, shared by both directions. ----

constexpr int64_t LARGEST_SPAN = 128 + GROUP;  // rows that stack buffers are made for

template <typename T>
inline T* logsumexp_row(const Problem& p, const Band& band, int64_t y) {
  return static_cast<T*>(p.logsumexp) +
         ((band.image * p.heads + band.head) * p.height + band.phase_row + y * p.dilation) * p.width +
         band.phase_col;
}

// Where the sums over TABLE_ROWS rows of a map at one phase go; see problem.h.
template <typename T>
inline T* table_grads(const Problem& p, const Band& band, int64_t block) {
  const int64_t phase = band.phase_row * p.dilation + band.phase_col;
  const int64_t blocks = (p.height + TABLE_ROWS - 1) / TABLE_ROWS;
  return static_cast<T*>(p.table_grads) +
         (((band.image * p.heads + band.head) * p.dilation * p.dilation + phase) * blocks + block) *
             (p.depth / 2 * 2 * p.kernel_size);
}

template <typename T>
struct Tables {
  const T* row = nullptr;
  const T* col = nullptr;
};

template <typename T>
inline Tables<T> tables_of(const Problem& p, int64_t head) {
  Tables<T> tables;
  if (p.rel_row) {
    const int64_t offset = head * (p.depth / 2) * p.kernel_size;
    tables.row = static_cast<const T*>(p.rel_row) + offset;
    tables.col = static_cast<const T*>(p.rel_col) + offset;
  }
  return tables;
}

// The bias of the window's rows and columns, (2, k) vectors.
template <typename T>
inline void biases(const Layout<T>& at, const Tables<T>& tables, const T* q, Vec<T>* bias) {
  for (int64_t n = 0; n < 2 * at.k; ++n) bias[n] = Vec<T>{};
  if (!tables.row) return;
  const int64_t half = at.depth / 2;
  in_pieces(at.k, [&](auto count, int64_t n) {
    table_dots<count.value>(q, tables.row + n, half, at.stride, at.k, bias + n);
    table_dots<count.value>(q + half * at.stride, tables.col + n, half, at.stride, at.k,
                            bias + at.k + n);
  });
}

// Close the positions of a window's row that lie left or right of the map.
template <typename T>
inline void close_sides(const Layout<T>& at, int64_t x, Vec<T>* row) {
  typedef typename Vector<T>::type V;
  if (x >= at.radius && x + Vector<T>::lanes + at.radius <= at.width) return;
  V place;
  for (int n = 0; n < Vector<T>::lanes; ++n) place[n] = T(x + n - at.radius);
  for (int64_t j = 0; j < at.k; ++j) {
    const V col = place + T(j);
    const auto outside = (col < T(0)) | (col >= T(at.width));
    row[j] = outside ? splat<T>(-__builtin_inf()) : row[j];
  }
}

// The packed rows that a group of windows spans, null outside of the map.
template <typename T>
inline void span_rows(const Layout<T>& at, const Ring<T>& ring, int64_t y, int64_t rows, const T** out) {
  for (int64_t u = 0; u < at.k + rows - 1; ++u) {
    const int64_t row = y - at.radius + u;
    out[u] = row >= 0 && row < at.height ? ring.row(row) : nullptr;
  }
  out[at.k + rows - 1] = nullptr;
}

// out[g][i][j] = bias[g] + a[g] . rows[i + g] shifted by j, for one vector of pixels and the windows of G
// rows. What lies in no row of the map is left as it is.
template <int G, typename T>
inline void window_dots(const Layout<T>& at, const T* const* a, const T* const* rows, int64_t offset,
                        const Vec<T>* bias, Vec<T>* out) {
  const int64_t k = at.k;
  for (int64_t u = 0; u < k + G - 1; ++u) {
    if (!rows[u]) continue;
    const int64_t first = u < k ? 0 : u - k + 1, last = u < G ? u : G - 1;
    const T* soon = rows[u + 1] ? rows[u + 1] : rows[u];
    const Vec<T>* own = bias + first * 2 * k;
    as_group(last - first + 1, [&](auto count) {
      if constexpr (count.value > G) return;
      in_pieces(k, [&](auto neighbours, int64_t n) {
        const Bias<T> start{own + u - first, own + k + n, 2 * k};
        dots<count.value, neighbours.value>(a + first, rows[u] + offset + n, soon + offset, at.depth,
                                            at.stride, start,
                                            out + first * k * k + (u - first) * k + n, k * k - k);
      });
    });
  }
}

// The logits of what window_dots leaves out: outside of the map, and everywhere where there is no key. They
// are the bias of row and column, or closed.
template <typename T>
inline void logits_without_key(const Problem& p, const Layout<T>& at, const Vec<T>* bias, int64_t y,
                               Vec<T>* out) {
  for (int64_t i = 0; i < at.k; ++i, out += at.k) {
    const bool outside = y + i < at.radius || y + i - at.radius >= at.height;
    if (p.key.data && !outside) continue;
    for (int64_t j = 0; j < at.k; ++j)
      out[j] = p.mask && outside ? splat<T>(-__builtin_inf()) : bias[i] + bias[at.k + j];
  }
}

// The largest of n vectors, lane by lane, in four chains that do not wait for each other. A NaN never
// becomes the largest; it comes out of the sum of the exponentials all the same.
template <typename T>
inline Vec<T> largest(const Vec<T>* x, int64_t n) {
  Vec<T> peak[4];
  for (int m = 0; m < 4; ++m) peak[m] = splat<T>(-__builtin_inf());
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) peak[m] = x[i + m] > peak[m] ? x[i + m] : peak[m];
  for (; i < n; ++i) peak[0] = x[i] > peak[0] ? x[i] : peak[0];
  for (int m = 1; m < 4; ++m) peak[0] = peak[m] > peak[0] ? peak[m] : peak[0];
  return peak[0];
}

// ---- Forward. ----

template <typename T>
void forward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> at(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = at.k, radius = at.radius, window = k * k;
  Ring<T> keys{has_key ? scratch.take(span(k) * at.map_row()) : nullptr, span(k), at.map_row()};
  Ring<T> values{scratch.take(span(k) * at.map_row()), span(k), at.map_row()};
  T* q = scratch.take(GROUP * at.map_row());
  T* out = scratch.take(GROUP * at.map_row());
  V* logits = reinterpret_cast<V*>(scratch.take(GROUP * window * L));
  V* bias = reinterpret_cast<V*>(scratch.take(GROUP * 2 * k * L));
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head);
  const T* key_rows[LARGEST_SPAN];
  const T* value_rows[LARGEST_SPAN];
  const T* weights[LARGEST_SPAN][GROUP];
  const Span<T> seen{value_rows, weights, k, at.stride, L};
  for (int64_t u = 0; u < span(k); ++u)
    for (int64_t g = 0; g < GROUP; ++g)
      weights[u][g] = reinterpret_cast<const T*>(logits + g * window + (u - g) * k);

  int64_t next = band.first > radius ? band.first - radius : 0;  // row to bring in
  for (int64_t y = band.first; y < band.last; y += GROUP) {
    const int64_t rows = band.last - y < GROUP ? band.last - y : GROUP;
    for (; next < at.height && next < y + rows + radius; ++next) {
      if (has_key) pack(p.key, p, at, band, next, T(1), keys.row(next));
      pack(p.value, p, at, band, next, T(1), values.row(next));
    }
    for (int64_t g = 0; g < rows; ++g)
      pack(p.query, p, at, band, y + g, T(p.scale * LOG2_E), q + g * at.map_row());
    if (has_key) span_rows(at, keys, y, rows, key_rows);
    span_rows(at, values, y, rows, value_rows);

    as_group(rows, [&](auto group) {
      constexpr int G = group.value;
      for (int64_t x = 0; x < at.padded; x += L) {
        const int64_t offset = at.margin + x - radius;
        const T* here[G];
        for (int g = 0; g < G; ++g) {
          here[g] = q + g * at.map_row() + at.margin + x;
          biases(at, tables, here[g], bias + g * 2 * k);
          logits_without_key(p, at, bias + g * 2 * k, y + g, logits + g * window);
        }
        if (has_key) window_dots<G>(at, here, key_rows, offset, bias, logits);
        V share[G];
        for (int g = 0; g < G; ++g) {
          V* own = logits + g * window;
          if (p.mask)
            for (int64_t i = 0; i < k; ++i) close_sides(at, x, own + i * k);
          const V peak = largest<T>(own, window);
          V total = V{};
#pragma GCC unroll 4
          for (int64_t n = 0; n < window; ++n) {
            own[n] = exp2_vec(own[n] - peak);
            total += own[n];
          }
          share[g] = T(1) / total;
          const V sum = peak + log_vec(total) * T(LOG2_E);
          T* lse = logsumexp_row<T>(p, band, y + g) + x * p.dilation;
          if (p.dilation == 1 && x + L <= at.width)
            store(lse, sum);
          else
            for (int n = 0; n < L && x + n < at.width; ++n) lse[n * p.dilation] = sum[n];
        }
        by_channels(at.depth, [&](auto count, int64_t c) {
          V sums[G * count.value];
          window_sums<G, count.value, 1>(seen, offset + c * at.stride, 0, sums);
          for (int g = 0; g < G; ++g)
            for (int n = 0; n < count.value; ++n)
              store(out + g * at.map_row() + at.margin + x + (c + n) * at.stride,
                    sums[g * count.value + n] * share[g]);
        });
      }
    });
    for (int64_t g = 0; g < rows; ++g)
      unpack(p.output, p, at, band, y + g, T(1), out + g * at.map_row());
  }
}

// ---- Backward. ----

template <typename T>
void backward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> at(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = at.k, radius = at.radius, half = at.depth / 2, window = k * k;
  const int64_t lag = lagging_span(k);
  Ring<T> keys{has_key ? scratch.take(span(k) * at.map_row()) : nullptr, span(k), at.map_row()};
  Ring<T> values{scratch.take(span(k) * at.map_row()), span(k), at.map_row()};
  Ring<T> queries{scratch.take(lag * at.map_row()), lag, at.map_row()};
  Ring<T> grads{scratch.take(lag * at.map_row()), lag, at.map_row()};
  Ring<T> weights{scratch.take(lag * at.pair_row()), lag, at.pair_row()};
  Ring<T> pulls{scratch.take(lag * at.pair_row()), lag, at.pair_row()};  // d loss / d logit
  T* out = scratch.take(GROUP * at.map_row());
  T* by_row = scratch.take(GROUP * k * at.stride);
  T* by_col = scratch.take(GROUP * k * at.stride);
  T* shift = scratch.take(GROUP * at.stride);
  V* logits = reinterpret_cast<V*>(scratch.take(GROUP * window * L));
  V* pull = reinterpret_cast<V*>(scratch.take(GROUP * window * L));
  V* bias = reinterpret_cast<V*>(scratch.take(GROUP * 2 * k * L));
  const V* no_bias = reinterpret_cast<V*>(scratch.take(GROUP * 2 * k * L));
  V* table_sums = reinterpret_cast<V*>(scratch.take(at.depth * k * L));
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  clear(reinterpret_cast<T*>(table_sums), at.depth * k * L);
  const Tables<T> tables = tables_of<T>(p, band.head);

  // Gradients of the keys or values of a group of rows: a gather over the windows that they are in.
  auto gather = [&](int64_t y, int64_t rows, const Ring<T>& pairs, const Ring<T>& maps,
                    const Map& result, T factor) {
    const T* map_rows[LARGEST_SPAN];
    const T* pair_rows[LARGEST_SPAN][GROUP];
    const Span<T> seeing{map_rows, pair_rows, k, at.stride, at.stride};
    span_rows(at, maps, y, rows, map_rows);
    for (int64_t u = 0; u < k + rows - 1; ++u)
      for (int64_t g = 0; map_rows[u] && g < rows; ++g)
        // Row u of the span sees row y + g of the map in row k - 1 - (u - g) of its window.
        pair_rows[u][g] = pairs.row(y - radius + u) + (k - 1 - u + g) * k * at.stride;
    as_group(rows, [&](auto group) {
      constexpr int G = group.value;
      for (int64_t x = 0; x < at.padded; x += L) {
        const int64_t offset = at.margin + x + radius;
        by_channels(at.depth, [&](auto count, int64_t c) {
          V sums[G * count.value];
          window_sums<G, count.value, -1>(seeing, offset + c * at.stride, offset, sums);
          for (int g = 0; g < G; ++g)
            for (int n = 0; n < count.value; ++n)
              store(out + g * at.map_row() + at.margin + x + (c + n) * at.stride,
                    sums[g * count.value + n]);
        });
      }
    });
    for (int64_t g = 0; g < rows; ++g)
      unpack(result, p, at, band, y + g, factor, out + g * at.map_row());
  };
  auto key_rows_of = [&](int64_t y, int64_t rows) {
    if (has_key) gather(y, rows, pulls, queries, p.grad_key, T(LN_2));
    gather(y, rows, weights, grads, p.grad_value, T(1));
  };

  // The keys of this band are seen by queries up to a radius above and below it.
  const int64_t first = band.first > radius ? band.first - radius : 0;
  const int64_t last = band.last + radius < at.height ? band.last + radius : at.height;
  int64_t next = first > radius ? first - radius : 0;  // row of keys to bring in
  int64_t done = band.first;                           // rows of keys whose gradients are written
  for (int64_t y = first; y < last; y += GROUP) {
    const int64_t rows = last - y < GROUP ? last - y : GROUP;
    for (; next < at.height && next < y + rows + radius; ++next) {
      if (has_key) pack(p.key, p, at, band, next, T(1), keys.row(next));
      pack(p.value, p, at, band, next, T(1), values.row(next));
    }
    const T* key_rows[LARGEST_SPAN];
    const T* value_rows[LARGEST_SPAN];
    const T* pull_rows[LARGEST_SPAN][GROUP];
    const Span<T> seen{key_rows, pull_rows, k, at.stride, at.stride};
    if (has_key) span_rows(at, keys, y, rows, key_rows);
    span_rows(at, values, y, rows, value_rows);
    for (int64_t u = 0; u < k + rows - 1; ++u)
      for (int64_t g = 0; g < rows; ++g)
        pull_rows[u][g] = pulls.row(y + g) + (u - g) * k * at.stride;
    for (int64_t g = 0; g < rows; ++g) {
      pack(p.query, p, at, band, y + g, T(p.scale * LOG2_E), queries.row(y + g));
      pack(p.grad, p, at, band, y + g, T(1), grads.row(y + g));
      const T* lse = logsumexp_row<T>(p, band, y + g);
      for (int64_t x = 0; x < at.width; ++x)
        shift[g * at.stride + x] = lse[x * p.dilation];
    }

    as_group(rows, [&](auto group) {
      constexpr int G = group.value;
      for (int64_t x = 0; x < at.padded; x += L) {
        const int64_t offset = at.margin + x - radius;
        const T *here[G], *grad_here[G];
        for (int g = 0; g < G; ++g) {
          here[g] = queries.row(y + g) + at.margin + x;
          grad_here[g] = grads.row(y + g) + at.margin + x;
          biases(at, tables, here[g], bias + g * 2 * k);
          logits_without_key(p, at, bias + g * 2 * k, y + g, logits + g * window);
          for (int64_t i = 0; i < k; ++i)
            if (!value_rows[g + i]) clear(reinterpret_cast<T*>(pull + g * window + i * k), k * L);
        }
        if (has_key) window_dots<G>(at, here, key_rows, offset, bias, logits);
        window_dots<G>(at, grad_here, value_rows, offset, no_bias, pull);
        for (int g = 0; g < G; ++g) {
          V *own = logits + g * window, *own_pull = pull + g * window;
          if (p.mask)
            for (int64_t i = 0; i < k; ++i) close_sides(at, x, own + i * k);
          T* w = weights.row(y + g) + at.margin + x;
          T* d = pulls.row(y + g) + at.margin + x;
          const V lse = load(shift + g * at.stride + x);
          V mean = V{};  // of d loss / d weight, by the weights: what softmax takes off each
          for (int64_t n = 0; n < window; ++n) {
            own[n] = exp2_vec(own[n] - lse);
            store(w + n * at.stride, own[n]);
            own_pull[n] *= own[n];
            mean += own_pull[n];
          }
          T* rows_at = by_row + g * k * at.stride + x;
          T* cols_at = by_col + g * k * at.stride + x;
          V* cols = bias;
          for (int64_t j = 0; j < k; ++j) cols[j] = V{};
          for (int64_t i = 0; i < k; ++i) {
            V total = V{};
            for (int64_t j = 0; j < k; ++j) {
              const int64_t n = i * k + j;
              const V push = own_pull[n] - mean * own[n];
              store(d + n * at.stride, push);
              total += push;
              cols[j] += push;
            }
            store(rows_at + i * at.stride, total);
          }
          for (int64_t j = 0; j < k; ++j) store(cols_at + j * at.stride, cols[j]);
        }
      }
      for (int64_t x = 0; x < at.padded; x += L)
        by_channels(at.depth, [&](auto count, int64_t c) {
          V sums[G * count.value] = {};
          if (has_key)
            window_sums<G, count.value, 1>(seen, at.margin + x - radius + c * at.stride,
                                           at.margin + x, sums);
          for (int g = 0; g < G; ++g)
            for (int n = 0; n < count.value; ++n) {
              V sum = sums[g * count.value + n];
              if (tables.row) {
                const bool is_row = c + n < half;
                const T* table = is_row ? tables.row + (c + n) * k : tables.col + (c + n - half) * k;
                const T* by = (is_row ? by_row : by_col) + g * k * at.stride + x;
                for (int64_t t = 0; t < k; ++t) sum += table[t] * load(by + t * at.stride);
              }
              store(out + g * at.map_row() + at.margin + x + (c + n) * at.stride, sum);
            }
        });
    });
    for (int64_t g = 0; g < rows; ++g) {
      // Rows above and below the band are their own bands' to write and to count.
      if (y + g < band.first || y + g >= band.last) continue;
      unpack(p.grad_query, p, at, band, y + g, T(p.scale), out + g * at.map_row());
      if (!tables.row) continue;
      const T* q = queries.row(y + g) + at.margin;
      for (int64_t c = 0; c < at.depth; ++c)
        in_pieces(k, [&](auto count, int64_t n) {
          row_dots<count.value>(q + c * at.stride,
                                (c < half ? by_row : by_col) + (g * k + n) * at.stride, at.padded,
                                at.stride, table_sums + c * k + n);
        });
      if ((y + g + 1) % TABLE_ROWS == 0 || y + g + 1 == at.height) {
        T* sums = table_grads<T>(p, band, (y + g) / TABLE_ROWS);
        for (int64_t n = 0; n < at.depth * k; ++n) {
          sums[n] = sum_lanes<T>(table_sums[n]) * T(LN_2);
          table_sums[n] = V{};
        }
      }
    }
    for (; done + GROUP <= band.last && done + GROUP + radius <= y + rows; done += GROUP)
      key_rows_of(done, GROUP);
  }
  // The last rows of the map have no query a radius below them to wait for.
  for (; done < band.last; done += GROUP)
    key_rows_of(done, band.last - done < GROUP ? band.last - done : GROUP);
}

template <typename T>
int64_t scratch_elements(const Problem& p, bool backward) {
  const Layout<T> at(p, 0, 0);
  const int64_t k = at.k, lanes = Vector<T>::lanes, lag = lagging_span(k);
  const int64_t bias = GROUP * 2 * k * lanes, windows = GROUP * k * k * lanes;
  const int64_t pieces = 32 * lanes;  // what rounding up may add
  if (!backward) return (2 * span(k) + 2 * GROUP) * at.map_row() + windows + bias + pieces;
  return (2 * span(k) + 2 * lag + GROUP) * at.map_row() + 2 * lag * at.pair_row() +
         (2 * k + 1) * GROUP * at.stride + 2 * windows + 2 * bias + at.depth * k * lanes + pieces;
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
