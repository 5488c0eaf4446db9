// -mavx2 -mfma -mf16c
#define RNNFAST_ISA avx2
#define RNNFAST_NAME "avx2"
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_VECTOR_REGISTERS 16
#include "cpu/kernels/kernels.inl.h"
