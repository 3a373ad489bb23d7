// Vectors of pixels, their powers of two and logarithms, and the types in which maps are stored.
#pragma once

namespace sasa {
namespace {

// Logits are in units of log 2, as exp2 is cheaper than exp. So Q is packed times log2(e), and the gradients
// that are sums over Q are multiplied by log(2).
constexpr double LOG2_E = 1.44269504088896340736;
constexpr double LN_2 = 0.693147180559945309417;

template <typename T>
struct Vector {
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  // May lie at any element, and may alias the scalars that it is loaded from.
  typedef T unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
using Vec = typename Vector<T>::type;

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}

// Hide from the compiler where a value comes from.
template <typename T>
inline Vec<T> opaque(Vec<T> x) {
#if defined(__x86_64__) && !defined(__clang__)
  asm("" : "+v"(x));
#endif
  return x;
}

// Load once for several uses. Otherwise GCC folds the load into each product, which loads it again.
template <typename T>
inline Vec<T> load_once(const T* p) {
  return opaque<T>(load(p));
}

template <typename T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = x;
}

// Compilers know that x - 0 is x. They do not know it of x + 0, where x may be -0.
template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// The larger of two, lane by lane, and b where either is NaN. It is one instruction, unless the compiler sees
// that either is a constant.
template <typename T>
inline Vec<T> max_vec(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline T sum_lanes(Vec<T> x) {
  T lanes[Vector<T>::lanes];
  store(lanes, x);
  for (int half = Vector<T>::lanes / 2; half > 0; half /= 2)
    for (int n = 0; n < half; ++n) lanes[n] += lanes[n + half];
  return lanes[0];
}

// 2^x for x of at most some 120, and 2^LEAST for all that is smaller. A window's largest weight is 2^0, beside
// which that is nothing. Products with it are seldom subnormal numbers, which are slow.
// The fraction takes a minimax polynomial of relative error 1e-7. The whole part becomes the exponent's bits.
// The two are multiplied, so that NaN stays NaN; adding to the bits would lose it.
inline Vec<float> exp2_vec(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  constexpr float LEAST = -64.0f;
  // Adding 1.5 * 2^23 rounds to an integer; 127 is the bias of an exponent.
  const auto magic = splat<float>(12582912.0f + 127);
  x = max_vec<float>(opaque<float>(splat<float>(LEAST)), x);
  const Vec<float> shifted = x + magic;
  const Vec<float> r = x - (shifted - magic);
  Vec<float> y = splat<float>(1.32647272e-3f);
  y = y * r + 9.67151264e-3f;
  y = y * r + 5.55073374e-2f;
  y = y * r + 2.40222421e-1f;
  y = y * r + 6.93146978e-1f;
  y = y * r + 1.0f;
  return y * (Vec<float>)((Bits)shifted << 23);
}

inline Vec<double> exp2_vec(Vec<double> x) {
  typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  constexpr double LEAST = -1000.0;
  const auto magic = splat<double>(6755399441055744.0 + 1023);  // 1.5 * 2^52 and an exponent's bias
  x = max_vec<double>(opaque<double>(splat<double>(LEAST)), x);
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
  return y * (Vec<double>)((Bits)shifted << 52);
}

// Natural logarithm of normal numbers, as in Cephes' logf; NaN stays NaN.
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
  // Shift exponent and mantissa to a float's, then correct the exponent's bias by a product. That is right
  // for subnormals as well. Infinity and NaN keep an exponent of all ones.
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
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits lowest
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = uint16_t(sign | half);
}

}  // namespace
}  // namespace sasa
