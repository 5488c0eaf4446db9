// Any x86-64 (SSE2), or another machine with 128-bit vectors. No flags.
#define RNNFAST_ISA base
#define RNNFAST_NAME "base"
#define RNNFAST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNNFAST_VECTOR_REGISTERS 32
#else
#define RNNFAST_VECTOR_REGISTERS 16
#endif
#include "cpu/kernels/kernels.inl.h"
