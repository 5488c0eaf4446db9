// What the lanes of a warp compute together, and the number formats of the tensor cores.
#pragma once
#include <cstdint>

namespace rnnfast::emulator {

struct ShuffleArgument {
  uint32_t value, result;
  int lane;  // shuffle: the source; shuffle_xor: the mask
};
void compute_shuffle(void** arguments);
void compute_shuffle_xor(void** arguments);
void compute_any(void** arguments);
void compute_all(void** arguments);
void compute_transpose(void** arguments);

struct MmaArgument {
  float* sums;
  const uint32_t* a;
  uint32_t b[2];
};
void compute_mma_bf16(void** arguments);
void compute_mma_half(void** arguments);
void compute_mma_tf32(void** arguments);

// Round to nearest even. NaN becomes 0x7FFF, as in the hardware's conversions.
uint16_t to_bf16(float value);
uint16_t to_half(float value);
float from_half(uint16_t bits);
inline float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t{bits} << 16); }

// `exact` with a relative error of up to 2^-bits. The bits of `argument` decide the error.
float perturb(double exact, float argument, int bits);

}  // namespace rnnfast::emulator
