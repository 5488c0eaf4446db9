// -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c. Frozen int8 alone.
#define RNNFAST_ISA avx512_vnni
#define RNNFAST_NAME "avx512_vnni"
#define RNNFAST_VECTOR_BYTES 64
#define RNNFAST_VECTOR_REGISTERS 32
#define RNNFAST_INT8_ONLY
#include "cpu/kernels/kernels.inl.h"
