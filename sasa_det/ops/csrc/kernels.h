// The kernels themselves, included by one file for each CPU capability, which sets VECTOR_BYTES and
// CAPABILITY. Everything is in an unnamed namespace: see problem.h for why.
//
// A band is streamed row by row. The k rows of keys and values that a row of queries sees lie packed in
// a ring, one vector of neighbouring pixels after the other, in the compute type and with a margin of
// zeros, so that strides, layouts, types, dilation and borders end where packing ends. All loops over
// pixels are whole vectors; lanes past the last pixel compute on zeros and are not stored.
//
// No sum runs over more than one thread or depends on how a map is cut into bands: the same input gives
// the same bits at any thread count.

namespace sasa {
namespace {

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

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

// exp for arguments of at most some 80 in magnitude above zero; 0 below the smallest normal result.
// Cephes' reduction: x = n ln 2 + r, exp(x) = 2^n exp(r).
inline Vec<float> exp_vec(Vec<float> x) {
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  const auto low = splat<float>(-87.3f);
  const Int under = x < low;
  const Vec<float> clamped = under ? low : x;
  const auto magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = clamped * 1.44269504f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> y = splat<float>(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Int exponent = ((Int)shifted - (Int)magic) << 23;
  const Vec<float> result = (Vec<float>)((Int)y + exponent);
  return under ? splat<float>(0) : result;
}

inline Vec<double> exp_vec(Vec<double> x) {
  typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
  const auto low = splat<double>(-708.0);
  const Int under = x < low;
  const Vec<double> clamped = under ? low : x;
  const auto magic = splat<double>(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> shifted = clamped * 1.4426950408889634 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> r = (clamped - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
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
  const Int exponent = ((Int)shifted - (Int)magic) << 52;
  const Vec<double> result = (Vec<double>)((Int)y + exponent);
  return under ? splat<double>(0) : result;
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
        stride(margin + padded + margin) {}

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

template <typename S, typename T>
void pack_as(const Map& map, const Problem& p, const Layout<T>& at, const Band& band, int64_t y,
             T factor, T* to) {
  const S* from = static_cast<const S*>(map.data) + band.image * map.batch +
                  band.head * p.depth * map.channel +
                  (band.phase_row + y * p.dilation) * map.row + band.phase_col * map.col;
  const int64_t step = map.col * p.dilation;
  to += at.margin;
  if (map.channel == 1 && step != 1) {
    for (int64_t x = 0; x < at.width; ++x)
      for (int64_t c = 0; c < p.depth; ++c) {
        T value;
        widen(value, from[x * step + c]);
        to[c * at.stride + x] = value * factor;
      }
    return;
  }
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
  if (map.channel == 1 && step != 1) {
    for (int64_t x = 0; x < at.width; ++x)
      for (int64_t c = 0; c < p.depth; ++c)
        narrow(to[x * step + c], from[c * at.stride + x] * factor);
    return;
  }
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

// A ring of packed rows; row y stays in it until row y + k is asked for.
template <typename T>
struct Ring {
  T* data;
  int64_t k, row_size;
  T* row(int64_t y) const { return data + ((y % k) + k) % k * row_size; }
};

// ---- Products. ----

// Fetch what the next vector of pixels will read of this row: a window's rows and channels lie too far
// apart for the hardware to see the pattern, and are too many to stay in the first cache.
template <typename T>
inline void ahead(const T* p) {
  __builtin_prefetch(p + 2 * Vector<T>::lanes);
}

// out[n] += sum over c of a[c] * b[c] shifted by n pixels, for one vector of pixels.
template <int N, typename T>
inline void dots(const T* a, const T* b, int64_t depth, int64_t stride, Vec<T>* out) {
  Vec<T> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t c = 0; c < depth; ++c) {
    const Vec<T> factor = load(a + c * stride);
    ahead(b + c * stride);
    for (int n = 0; n < N; ++n) sum[n] += factor * load(b + c * stride + n);
  }
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// out[n] += sum over c of a[c] * table[c][n].
template <int N, typename T>
inline void table_dots(const T* a, const T* table, int64_t depth, int64_t stride, int64_t k,
                       Vec<T>* out) {
  Vec<T> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t c = 0; c < depth; ++c) {
    const Vec<T> factor = load(a + c * stride);
    for (int n = 0; n < N; ++n) sum[n] += factor * table[c * k + n];
  }
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// out[n] += sum over pixels of a * b[n], lane by lane.
template <int N, typename T>
inline void row_dots(const T* a, const T* b, int64_t padded, int64_t stride, Vec<T>* out) {
  Vec<T> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = out[n];
  for (int64_t x = 0; x < padded; x += Vector<T>::lanes) {
    const Vec<T> factor = load(a + x);
    for (int n = 0; n < N; ++n) sum[n] += factor * load(b + n * stride + x);
  }
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// Call fn with the number of results as a compile-time constant, k at once or in pieces.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <typename F>
inline void in_pieces(int64_t k, const F& fn) {
  switch (k) {  // what the paper's tables have, at full register use
    case 3: fn(Count<3>(), 0); return;
    case 5: fn(Count<5>(), 0); return;
    case 7: fn(Count<7>(), 0); return;
    case 9: fn(Count<9>(), 0); return;
    case 11: fn(Count<11>(), 0); return;
  }
  int64_t n = 0;
  for (; n + 4 <= k; n += 4) fn(Count<4>(), n);
  for (; n < k; ++n) fn(Count<1>(), n);
}

// Channels at a time: accumulators of N channels, and of N more in the backward, stay in registers.
template <typename F>
inline void by_channels(int64_t depth, const F& fn) {
  int64_t c = 0;
  for (; c + MAX_CHANNELS <= depth; c += MAX_CHANNELS) fn(Count<MAX_CHANNELS>(), c);
  for (; c + 2 <= depth; c += 2) fn(Count<2>(), c);
  for (; c < depth; ++c) fn(Count<1>(), c);
}

// out[c] = sum over the window of weights * maps[c], for one vector of pixels.
template <int N, typename T>
inline void weighted_sum(const T* weights, int64_t weight_stride, const T* const* rows, int64_t k,
                         int64_t offset, int64_t stride, Vec<T>* out) {
  Vec<T> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    const T* row = rows[i] + offset;
    for (int n = 0; n < N; ++n) ahead(row + n * stride);
    for (int64_t j = 0; j < k; ++j) {
      const Vec<T> weight = load(weights + (i * k + j) * weight_stride);
      for (int n = 0; n < N; ++n) sum[n] += weight * load(row + n * stride + j);
    }
  }
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

// ---- Logits of one vector of pixels, shared by both directions. ----

constexpr int64_t LARGEST_ROW = 128;  // pixels of a window's row that stack buffers are made for

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

// ---- Forward. ----

template <typename T>
void forward_band(const Problem& p, const Band& band, void* memory) {
  typedef Vec<T> V;
  constexpr int L = Vector<T>::lanes;
  const Layout<T> at(p, band.phase_row, band.phase_col);
  Scratch<T> scratch{static_cast<T*>(memory)};
  const bool has_key = p.key.data != nullptr;
  const int64_t k = at.k, radius = at.radius;
  Ring<T> keys{has_key ? scratch.take(k * at.map_row()) : nullptr, k, at.map_row()};
  Ring<T> values{scratch.take(k * at.map_row()), k, at.map_row()};
  T* q = scratch.take(at.map_row());
  T* out = scratch.take(at.map_row());
  T* weights = scratch.take(k * k * L);
  T* bias_memory = scratch.take(2 * k * L);
  T* zeros = scratch.take(at.map_row());
  V* bias = reinterpret_cast<V*>(bias_memory);
  V* logits = reinterpret_cast<V*>(weights);
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head);
  const T* key_rows[LARGEST_ROW];
  const T* value_rows[LARGEST_ROW];

  auto bring = [&](int64_t y) {
    if (y < 0 || y >= at.height) return;
    if (has_key) pack(p.key, p, at, band, y, T(1), keys.row(y));
    pack(p.value, p, at, band, y, T(1), values.row(y));
  };
  for (int64_t y = band.first - radius; y < band.first + radius; ++y) bring(y);

  for (int64_t y = band.first; y < band.last; ++y) {
    bring(y + radius);
    pack(p.query, p, at, band, y, T(p.scale), q);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t row = y + i - radius;
      const bool inside = row >= 0 && row < at.height;
      key_rows[i] = inside && has_key ? keys.row(row) : zeros;
      value_rows[i] = inside ? values.row(row) : zeros;
    }
    T* lse = static_cast<T*>(p.logsumexp) +
             ((band.image * p.heads + band.head) * p.height + band.phase_row + y * p.dilation) *
                 p.width +
             band.phase_col;
    for (int64_t x = 0; x < at.padded; x += L) {
      const T* here = q + at.margin + x;
      const int64_t offset = at.margin + x - radius;
      biases(at, tables, here, bias);
      V peak = splat<T>(-__builtin_inf());
      for (int64_t i = 0; i < k; ++i) {
        V* row = logits + i * k;
        const int64_t key_row = y + i - radius;
        if (p.mask && (key_row < 0 || key_row >= at.height)) {
          for (int64_t j = 0; j < k; ++j) row[j] = splat<T>(-__builtin_inf());
          continue;
        }
        for (int64_t j = 0; j < k; ++j) row[j] = bias[i] + bias[k + j];
        if (has_key)
          in_pieces(k, [&](auto count, int64_t n) {
            dots<count.value>(here, key_rows[i] + offset + n, at.depth, at.stride, row + n);
          });
        if (p.mask) close_sides(at, x, row);
        for (int64_t j = 0; j < k; ++j) peak = row[j] > peak ? row[j] : peak;
      }
      // A NaN never becomes the peak, and comes out of the sum all the same.
      V total = V{};
      for (int64_t n = 0; n < k * k; ++n) {
        logits[n] = exp_vec(logits[n] - peak);
        total += logits[n];
      }
      const V share = T(1) / total;
      by_channels(at.depth, [&](auto count, int64_t c) {
        V sum[count.value];
        weighted_sum<count.value>(weights, L, value_rows, k, offset + c * at.stride, at.stride, sum);
        for (int n = 0; n < count.value; ++n)
          store(out + at.margin + x + (c + n) * at.stride, sum[n] * share);
      });
      for (int n = 0; n < L && x + n < at.width; ++n)
        lse[(x + n) * p.dilation] = peak[n] + log_of(T(total[n]));
    }
    unpack(p.output, p, at, band, y, T(1), out);
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
  const int64_t k = at.k, radius = at.radius, half = at.depth / 2;
  Ring<T> keys{has_key ? scratch.take(k * at.map_row()) : nullptr, k, at.map_row()};
  Ring<T> values{scratch.take(k * at.map_row()), k, at.map_row()};
  Ring<T> queries{scratch.take(k * at.map_row()), k, at.map_row()};
  Ring<T> grads{scratch.take(k * at.map_row()), k, at.map_row()};
  Ring<T> weights{scratch.take(k * at.pair_row()), k, at.pair_row()};
  Ring<T> pulls{scratch.take(k * at.pair_row()), k, at.pair_row()};  // d loss / d logit
  T* out = scratch.take(at.map_row());
  T* more = scratch.take(at.map_row());
  T* by_row = scratch.take(k * at.stride);
  T* by_col = scratch.take(k * at.stride);
  T* lse_row = scratch.take(at.stride);
  T* zeros = scratch.take(at.map_row());
  T* work = scratch.take(4 * k * L);
  V* bias = reinterpret_cast<V*>(work);
  V* row = bias + 2 * k;
  V* pull = row + k;
  // What is zero stays zero from band to band, unless the next phase has rows of another width.
  if (p.dilation > 1) clear(static_cast<T*>(memory), scratch.next - static_cast<T*>(memory));
  const Tables<T> tables = tables_of<T>(p, band.head);
  const T* key_rows[LARGEST_ROW];
  const T* value_rows[LARGEST_ROW];

  auto bring = [&](int64_t y) {
    if (y < 0 || y >= at.height) return;
    if (has_key) pack(p.key, p, at, band, y, T(1), keys.row(y));
    pack(p.value, p, at, band, y, T(1), values.row(y));
  };
  // The keys of this band are seen by queries up to a radius above and below it.
  const int64_t first = band.first - radius > 0 ? band.first - radius : 0;
  const int64_t last = band.last + radius < at.height ? band.last + radius : at.height;
  for (int64_t y = first - radius; y < first + radius; ++y) bring(y);

  auto key_row = [&](int64_t y) {  // gradients of the keys and values of row y
    const int64_t from = y - radius > 0 ? y - radius : 0;
    const int64_t to = y + radius < at.height ? y + radius + 1 : at.height;
    for (int64_t x = 0; x < at.padded; x += L)
      by_channels(at.depth, [&](auto count, int64_t c) {
        V of_key[count.value], of_value[count.value];
        for (int n = 0; n < count.value; ++n) of_key[n] = of_value[n] = V{};
        for (int64_t query = from; query < to; ++query) {
          const int64_t i = y - query + radius;
          const T* w = weights.row(query) + i * k * at.stride + at.margin;
          const T* d = pulls.row(query) + i * k * at.stride + at.margin;
          const T* q = queries.row(query) + c * at.stride + at.margin;
          const T* g = grads.row(query) + c * at.stride + at.margin;
          for (int64_t j = 0; j < k; ++j) {
            const int64_t place = x + radius - j;
            const V weight = load(w + j * at.stride + place), push = load(d + j * at.stride + place);
            for (int n = 0; n < count.value; ++n) {
              of_key[n] += push * load(q + n * at.stride + place);
              of_value[n] += weight * load(g + n * at.stride + place);
            }
          }
        }
        for (int n = 0; n < count.value; ++n) {
          store(out + at.margin + x + (c + n) * at.stride, of_key[n]);
          store(more + at.margin + x + (c + n) * at.stride, of_value[n]);
        }
      });
    if (has_key) unpack(p.grad_key, p, at, band, y, T(1), out);
    unpack(p.grad_value, p, at, band, y, T(1), more);
  };

  for (int64_t y = first; y < last; ++y) {
    bring(y + radius);
    const bool own = y >= band.first && y < band.last;
    T* q = queries.row(y);
    T* g = grads.row(y);
    pack(p.query, p, at, band, y, T(p.scale), q);
    pack(p.grad, p, at, band, y, T(1), g);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t source = y + i - radius;
      const bool inside = source >= 0 && source < at.height;
      key_rows[i] = inside && has_key ? keys.row(source) : zeros;
      value_rows[i] = inside ? values.row(source) : zeros;
    }
    const T* lse = static_cast<const T*>(p.logsumexp) +
                   ((band.image * p.heads + band.head) * p.height + band.phase_row +
                    y * p.dilation) * p.width + band.phase_col;
    for (int64_t x = 0; x < at.width; ++x) lse_row[x] = lse[x * p.dilation];

    for (int64_t x = 0; x < at.padded; x += L) {
      const T* here = q + at.margin + x;
      const T* grad_here = g + at.margin + x;
      const int64_t offset = at.margin + x - radius;
      biases(at, tables, here, bias);
      V mean = V{};  // of d loss / d weight, by the weights: what softmax takes off each
      for (int64_t i = 0; i < k; ++i) {
        const bool closed = p.mask && (y + i - radius < 0 || y + i - radius >= at.height);
        T* w = weights.row(y) + i * k * at.stride + at.margin + x;
        T* d = pulls.row(y) + i * k * at.stride + at.margin + x;
        if (closed) {
          for (int64_t j = 0; j < k; ++j) {
            store(w + j * at.stride, V{});
            store(d + j * at.stride, V{});
          }
        } else {
          for (int64_t j = 0; j < k; ++j) {
            row[j] = bias[i] + bias[k + j];
            pull[j] = V{};
          }
          in_pieces(k, [&](auto count, int64_t n) {
            if (has_key)
              dots<count.value>(here, key_rows[i] + offset + n, at.depth, at.stride, row + n);
            dots<count.value>(grad_here, value_rows[i] + offset + n, at.depth, at.stride, pull + n);
          });
          if (p.mask) close_sides(at, x, row);
          const V shift = load(lse_row + x);
          for (int64_t j = 0; j < k; ++j) {
            const V weight = exp_vec(row[j] - shift);
            const V push = weight * pull[j];
            store(w + j * at.stride, weight);
            store(d + j * at.stride, push);
            mean += push;
          }
        }
      }
      V cols[LARGEST_ROW];
      for (int64_t j = 0; j < k; ++j) cols[j] = V{};
      for (int64_t i = 0; i < k; ++i) {
        const T* w = weights.row(y) + i * k * at.stride + at.margin + x;
        T* d = pulls.row(y) + i * k * at.stride + at.margin + x;
        V total = V{};
        for (int64_t j = 0; j < k; ++j) {
          const V push = load(d + j * at.stride) - mean * load(w + j * at.stride);
          store(d + j * at.stride, push);
          total += push;
          cols[j] += push;
        }
        store(by_row + i * at.stride + x, total);
      }
      for (int64_t j = 0; j < k; ++j) store(by_col + j * at.stride + x, cols[j]);
    }

    if (own) {
      for (int64_t x = 0; x < at.padded; x += L)
        by_channels(at.depth, [&](auto count, int64_t c) {
          V sum[count.value];
          if (has_key)
            weighted_sum<count.value>(pulls.row(y) + at.margin + x, at.stride, key_rows, k,
                                      at.margin + x - radius + c * at.stride, at.stride, sum);
          else
            for (int n = 0; n < count.value; ++n) sum[n] = V{};
          if (tables.row)
            for (int n = 0; n < count.value; ++n) {
              const bool is_row = c + n < half;
              const T* table = is_row ? tables.row + (c + n) * k : tables.col + (c + n - half) * k;
              const T* by = (is_row ? by_row : by_col) + x;
              for (int64_t t = 0; t < k; ++t) sum[n] += table[t] * load(by + t * at.stride);
            }
          for (int n = 0; n < count.value; ++n)
            store(out + at.margin + x + (c + n) * at.stride, sum[n]);
        });
      unpack(p.grad_query, p, at, band, y, T(p.scale), out);
      if (tables.row) {
        T* sums = static_cast<T*>(p.table_grads) +
                  (((band.image * p.heads + band.head) * p.dilation + band.phase_col) * p.height +
                   band.phase_row + y * p.dilation) * 2 * half * k;
        for (int64_t c = 0; c < at.depth; ++c)
          in_pieces(k, [&](auto count, int64_t n) {
            V sum[count.value];
            for (int m = 0; m < count.value; ++m) sum[m] = V{};
            row_dots<count.value>(q + at.margin + c * at.stride,
                                  (c < half ? by_row : by_col) + n * at.stride, at.padded, at.stride,
                                  sum);
            for (int m = 0; m < count.value; ++m) {
              sums[c * k + n + m] = sum_lanes<T>(sum[m]);
            }
          });
      }
    }
    if (y - radius >= band.first && y - radius < band.last) key_row(y - radius);
  }
  // The last rows of the map have no query a radius below them to wait for.
  for (int64_t y = last - radius > band.first ? last - radius : band.first; y < band.last; ++y)
    key_row(y);
}

template <typename T>
int64_t scratch_elements(const Problem& p, bool backward) {
  const Layout<T> at(p, 0, 0);
  const int64_t k = at.k, lanes = Vector<T>::lanes;
  const int64_t pieces = 32 * lanes;  // what rounding up may add
  if (!backward)
    return (2 * k + 3) * at.map_row() + (k * k + 2 * k) * lanes + pieces;
  return (4 * k + 3) * at.map_row() + 2 * k * at.pair_row() + (2 * k + 2) * at.stride +
         4 * k * lanes + pieces;
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
