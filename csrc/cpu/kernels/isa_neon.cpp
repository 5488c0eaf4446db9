// aarch64, whose baseline has NEON and fma; no flags.
#define RNNFAST_ISA neon
#define RNNFAST_NAME "neon"
#define RNNFAST_VECTOR_BYTES 16
#include "cpu/kernels/kernels.inl.h"
