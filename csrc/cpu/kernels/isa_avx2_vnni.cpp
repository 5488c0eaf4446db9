// -mavx2 -mfma -mf16c -mavxvnni. Frozen int8 alone.
#define RNNFAST_ISA avx2_vnni
#define RNNFAST_NAME "avx2_vnni"
#define RNNFAST_VECTOR_BYTES 32
#define RNNFAST_VECTOR_REGISTERS 16
#define RNNFAST_INT8_ONLY
#include "cpu/kernels/kernels.inl.h"
