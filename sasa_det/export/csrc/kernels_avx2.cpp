#define ONLY_FLOAT_FORWARD
#include "../../ops/csrc/kernels_avx2.cpp"
