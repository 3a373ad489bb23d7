#include "problem.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define VECTOR_BYTES 64
#define VECTOR_REGISTERS 32
#include "kernels.h"

const sasa::Kernels& sasa::kernels_avx512() {
  static const Kernels kernels{"avx512", scratch, forward, backward, multiplication};
  return kernels;
}
