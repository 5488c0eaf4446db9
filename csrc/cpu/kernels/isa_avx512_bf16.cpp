// The flags of avx512 and -mavx512bf16: kernels for bfloat16 alone (dpbf16ps). isa_avx512.cpp has the other types.
#define RNNFAST_ISA avx512_bf16
#define RNNFAST_NAME "avx512_bf16"
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_BF16_ONLY
#define RNNFAST_VECTOR_REGISTERS 32
#include "cpu/kernels/kernels.inl.h"
