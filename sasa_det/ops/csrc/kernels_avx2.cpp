#include "problem.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#define VECTOR_REGISTERS 16
#include "kernels.h"

const sasa::Kernels& sasa::kernels_avx2() {
  static const Kernels kernels{"avx2", scratch, forward, backward, multiplication};
  return kernels;
}
