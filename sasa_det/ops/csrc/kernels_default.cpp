#include "problem.h"
#define VECTOR_BYTES 16
#define VECTOR_REGISTERS 16
#include "kernels.h"

const sasa::Kernels& sasa::kernels_default() {
  static const Kernels kernels{"default", scratch, forward, backward, multiplication};
  return kernels;
}
