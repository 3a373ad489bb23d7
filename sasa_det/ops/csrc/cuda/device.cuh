// Instructions of the GPU that C++ has no name for. The emulator in tests/ops/cuda_emulator has the same functions.
#pragma once
#ifdef EMULATED
#include "emulator.h"
#else

#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

#define DEV __device__ __forceinline__
#define BOTH __host__ __device__   // constants are computed with it, too
// A multiprocessor has 65536 registers: a bound of threads is one of registers for each.
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(65536 / REGISTERS / 32 * 32, 1) name
#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

extern __shared__ __align__(128) char shared_memory[];

// --- Shared memory, by addresses in bytes. Only so: a compiler that saw the pointers would merge and move loads, and
// copy what it loaded as a vector before each product.

DEV uint32_t shared_base() { return (uint32_t)__cvta_generic_to_shared(shared_memory); }

DEV uint4 load_shared4(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}
DEV uint2 load_shared2(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(x.x), "=r"(x.y) : "r"(at));
  return x;
}
DEV uint32_t load_shared1(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(at));
  return x;
}
DEV void store_shared1(uint32_t at, uint32_t x) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(at), "r"(x)); }
DEV void store_shared2(uint32_t at, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(at), "r"(x.x), "r"(x.y));
}

// Four 8 x 8 matrices, transposed. Lane l gives the address of row l % 8 of matrix l / 8.
DEV void load_matrices4(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at));
}
DEV void load_matrices2(uint32_t (&x)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at));
}

// --- Copies from global to shared memory that go on while the thread computes; zeros instead where not `there`.

DEV void copy16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
DEV void copy4(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0));
}
DEV void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- Global memory: what a kernel reads is not written while it runs.

template <typename T>
DEV T load_global(const void* from) {
  return __ldg(static_cast<const T*>(from));
}
DEV void store_global(void* to, uint4 x) {
  asm volatile("st.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w));
}
DEV void store_global(void* to, uint2 x) {
  asm volatile("st.global.v2.u32 [%0],{%1,%2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y));
}
DEV void store_global(void* to, uint32_t x) {
  asm volatile("st.global.u32 [%0],%1;" ::"l"(__cvta_generic_to_global(to)), "r"(x));
}

// --- Products

// d += a b, with a of 16 x 16 and b of 16 x 8 numbers. In what follows a thread is lane 4 g + t.
// a0: row g, columns 2t and 2t + 1; a1: row g + 8; a2: row g, columns 2t + 8 and 2t + 9; a3: row g + 8.
// b0: rows 2t and 2t + 1 of column g; b1: rows 2t + 8 and 2t + 9.
// d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8.
DEV void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// An 8 x 8 matrix, of which a thread has row g, columns 2t and 2t + 1, transposed.
DEV uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}
DEV uint32_t pack(float low, float high) {
  uint32_t x;
  asm("cvt.rn." TYPE "x2.f32 %0,%1,%2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// --- Functions of a number

// A register as it is: where a value is never used, no instruction need write it.
DEV float anything() {
  float x;
  asm("" : "=f"(x));
  return x;
}
DEV float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float as_float(uint32_t x) { return __uint_as_float(x); }
DEV uint32_t as_bits(float x) { return __float_as_uint(x); }

// The same number, as one that the compiler does not take apart to compute sums with it anew in each loop.
DEV uint32_t whole(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <typename T>
DEV T exchange(T x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}
DEV void meet_warp() { __syncwarp(); }
DEV void meet_block() { __syncthreads(); }

#endif
