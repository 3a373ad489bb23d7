// The kernels of one CPU capability. README.md says how they work, and what each term means.
//
// A kernels_*.cpp for each capability includes this file, and sets VECTOR_BYTES and VECTOR_REGISTERS. All is in
// an unnamed namespace: problem.h says why.
//
// All loops over pixels are over whole vectors. Lanes past the last pixel compute on zeros and are not stored.

#include "backward.h"
#include "forward.h"

namespace sasa {
namespace {

template <typename T>
int64_t scratch_elements(const Problem& p, bool backward) {
  const Layout<T> layout(p, 0, 0);  // of the first phase, which is the largest
  const int64_t rounding = 32 * Vector<T>::lanes;  // at least what Scratch rounds up
  return (backward ? backward_elements(layout) : forward_elements(layout)) + rounding;
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
