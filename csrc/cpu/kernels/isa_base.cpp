// Any x86-64 (SSE2) or other machine with 128-bit vectors; no flags.
#define RNNFAST_ISA base
#define RNNFAST_NAME "base"
#define RNNFAST_VECTOR_BYTES 16
#include "cpu/kernels/kernels.inl.h"
