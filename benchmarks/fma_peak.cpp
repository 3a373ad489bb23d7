// Multiply-adds on registers alone, as fast as a core can: what a kernel's FLOP/s are compared with.

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));

// More chains than a core's units times their latency, and few enough for 16 registers.
constexpr int CHAINS = 12;

// Returns the FLOP that it did, a multiply-add counting as two.
extern "C" double multiply_add(long rounds, float factor, float term, float* result) {
  Vector sums[CHAINS];
  for (int n = 0; n < CHAINS; ++n) sums[n] = Vector{} + float(n);
  for (long round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int n = 0; n < CHAINS; ++n) sums[n] = sums[n] * factor + term;
  for (int n = 1; n < CHAINS; ++n) sums[0] += sums[n];
  *result = 0;  // every lane goes into it, or a compiler may compute but the one that does
  for (unsigned lane = 0; lane < VECTOR_BYTES / sizeof(float); ++lane) *result += sums[0][lane];
  return 2.0 * rounds * CHAINS * (VECTOR_BYTES / sizeof(float));
}
