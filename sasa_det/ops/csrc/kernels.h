// The kernels of one CPU capability. README.md says how they work, and what each term means.
//
// A kernels_*.cpp for each capability includes this file, and sets VECTOR_BYTES and VECTOR_REGISTERS. All is in
// an unnamed namespace: problem.h says why.
//
// With ONLY_FLOAT_FORWARD they are what inference in onnxruntime takes: no backward, no double.
//
// All loops over pixels are over whole vectors. Lanes past the last pixel compute on zeros and are not stored.

#include "forward.h"
#if !defined(ONLY_FLOAT_FORWARD)
#include "backward.h"
#include "matmul.h"
#endif

namespace sasa {
namespace {

// Bytes for so many elements, and for at least what Scratch rounds up.
template <typename T>
int64_t scratch_bytes(int64_t elements) {
  return (elements + 32 * Vector<T>::lanes) * int64_t(sizeof(T));
}

template <typename T>
int64_t forward_bytes(const Problem& p) {
  return scratch_bytes<T>(forward_elements(Layout<T>(p, 0, 0)));  // the first phase is the largest
}

#if defined(ONLY_FLOAT_FORWARD)

int64_t scratch(const Problem& p, bool) { return forward_bytes<float>(p); }
void forward(const Problem& p, const Band& band, void* memory) { forward_band<float>(p, band, memory); }
constexpr decltype(Kernels::backward) backward = nullptr;
constexpr Multiplication multiplication{};

#else

template <typename T>
int64_t backward_bytes(const Problem& p) {
  return scratch_bytes<T>(backward_elements(Layout<T>(p, 0, 0)));
}

int64_t scratch(const Problem& p, bool backward) {
  if (p.type == Type::Double) return backward ? backward_bytes<double>(p) : forward_bytes<double>(p);
  return backward ? backward_bytes<float>(p) : forward_bytes<float>(p);
}

void forward(const Problem& p, const Band& band, void* memory) {
  if (p.type == Type::Double) forward_band<double>(p, band, memory);
  else forward_band<float>(p, band, memory);
}

void backward(const Problem& p, const Band& band, void* memory) {
  if (p.type == Type::Double) backward_band<double>(p, band, memory);
  else backward_band<float>(p, band, memory);
}

constexpr Multiplication multiplication{PANEL_ROWS, PANEL_COLUMNS, pack_panels<PANEL_ROWS>,
                                        pack_panels<PANEL_COLUMNS>, multiply_panels};

#endif

}  // namespace
}  // namespace sasa
