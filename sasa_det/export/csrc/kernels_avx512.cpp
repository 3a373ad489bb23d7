#define ONLY_FLOAT_FORWARD
#include "../../ops/csrc/kernels_avx512.cpp"
