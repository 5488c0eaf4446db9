// The avx512 flags and -mavx512bf16: adds bfloat16 by dpbf16ps to what isa_avx512.cpp offers.
#define RNNFAST_ISA avx512_bf16
#define RNNFAST_NAME "avx512_bf16"
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_BF16_ONLY
#include "cpu/kernels/kernels.inl.h"
