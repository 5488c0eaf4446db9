// aarch64, which always has NEON and fma. No flags.
#define RNNFAST_ISA neon
#define RNNFAST_NAME "neon"
#define RNNFAST_VECTOR_BYTES 16
#define RNNFAST_VECTOR_REGISTERS 32
#include "cpu/kernels/kernels.inl.h"
