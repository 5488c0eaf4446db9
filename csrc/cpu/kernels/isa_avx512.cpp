// -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
#define RNNFAST_ISA avx512
#define RNNFAST_NAME "avx512"
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_VECTOR_REGISTERS 32
#include "cpu/kernels/kernels.inl.h"
