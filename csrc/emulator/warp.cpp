// Collectives of a warp on plain arrays, in PTX's layout of tiles (csrc/cuda/device/primitives.cuh), and number
// formats.
#pragma GCC optimize("O3")  // the product of compute_mma() takes most of the emulator's time

#include "emulator/warp.h"

#include <cmath>
#include <limits>

namespace rnnfast::emulator {

namespace {

constexpr int kLanes = 32;

ShuffleArgument& shuffle_argument(void* argument) { return *static_cast<ShuffleArgument*>(argument); }

float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
uint32_t float_to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

float round_towards_zero(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(value)) return nearest;
  return bits_to_float(float_to_bits(nearest) - 1);
}

// Two columns of a tile at once.
typedef double Pair __attribute__((vector_size(16)));

// per_register: elements in a register of 4 bytes, 2 of 16 bits or one tf32. k = 8 per_register.
template <int per_register, class Decode>
void compute_mma(void** arguments, Decode decode) {
  constexpr int depth = 8 * per_register;
  double a[16][depth];
  Pair b[depth][4];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& argument = *static_cast<const MmaArgument*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < per_register; ++i) {
        const int k = half * depth / 2 + t * per_register + i;
        a[g][k] = decode(argument.a[2 * half], i);
        a[g + 8][k] = decode(argument.a[2 * half + 1], i);
        b[k][g / 2][g % 2] = decode(argument.b[half], i);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    Pair sums[4] = {};
    for (int k = 0; k < depth; ++k) {
      for (int pair = 0; pair < 4; ++pair) sums[pair] += a[row][k] * b[k][pair];
    }
    for (int column = 0; column < 8; ++column) {
      const auto& owner = *static_cast<const MmaArgument*>(arguments[row % 8 * 4 + column / 2]);
      float& sum = owner.sums[row / 8 * 2 + column % 2];
      sum = round_towards_zero(sum + sums[column / 2][column % 2]);
    }
  }
}

}  // namespace

void compute_mma_bf16(void** arguments) {
  compute_mma<2>(arguments, [](uint32_t bits, int i) -> double { return from_bf16(bits >> 16 * i); });
}
void compute_mma_half(void** arguments) {
  compute_mma<2>(arguments, [](uint32_t bits, int i) -> double { return from_half(bits >> 16 * i); });
}
void compute_mma_tf32(void** arguments) {  // the hardware ignores the low 13 bits of a register
  compute_mma<1>(arguments, [](uint32_t bits, int) -> double { return bits_to_float(bits & 0xFFFFE000u); });
}

void compute_shuffle(void** arguments) {
  for (int lane = 0; lane < kLanes; ++lane) {
    ShuffleArgument& own = shuffle_argument(arguments[lane]);
    own.result = shuffle_argument(arguments[own.lane & 31]).value;
  }
}

void compute_shuffle_xor(void** arguments) {
  for (int lane = 0; lane < kLanes; ++lane) {
    ShuffleArgument& own = shuffle_argument(arguments[lane]);
    own.result = shuffle_argument(arguments[(lane ^ own.lane) & 31]).value;
  }
}

void compute_any(void** arguments) {
  uint32_t any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= shuffle_argument(arguments[lane]).value;
  for (int lane = 0; lane < kLanes; ++lane) shuffle_argument(arguments[lane]).result = any;
}

void compute_all(void** arguments) {
  uint32_t all = 1;
  for (int lane = 0; lane < kLanes; ++lane) all &= shuffle_argument(arguments[lane]).value;
  for (int lane = 0; lane < kLanes; ++lane) shuffle_argument(arguments[lane]).result = all;
}

void compute_transpose(void** arguments) {
  uint16_t tile[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t pair = shuffle_argument(arguments[lane]).value;
    tile[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(pair);
    tile[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(pair >> 16);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    shuffle_argument(arguments[lane]).result = tile[column][row] | uint32_t{tile[column + 1][row]} << 16;
  }
}

uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t to_half(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint16_t sign = static_cast<uint16_t>(float_to_bits(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) {  // subnormal: whole multiples of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t bits = float_to_bits(magnitude) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}

float from_half(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

float perturb(double exact, float argument, int bits) {
  // 7/8 of the bound; the rounding to float below takes the rest.
  const uint32_t hash = float_to_bits(argument) * 0x9E3779B1u >> 16;
  const double fraction = (static_cast<double>(hash) / 0xFFFF * 2 - 1) * 0.875;
  const float result = static_cast<float>(exact * (1 + fraction * std::ldexp(1.0, -bits)));
  return std::fabs(result) < std::numeric_limits<float>::min() ? 0.0f : result;
}

}  // namespace rnnfast::emulator
