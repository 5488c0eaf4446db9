// How each Arithmetic stores, multiplies and rounds: the element type, its operand words, the mma that takes them.
//
// An operand word is 32 bits: a pair of 16-bit elements, or one float. An mma takes 16 rows of weights times 8 columns
// of state over 8 words of depth. Arithmetic::kExact splits a float into two operands that tensor cores take: `high`,
// its leading 11 bits, and `low`, the next 11. high * high + high * low + low * high is as accurate as a float product.
#pragma once

#include "cuda/device/math.cuh"
#include "cuda/device/primitives.cuh"
#include "cuda/layer.h"

namespace rnnfast::cuda {

template <Arithmetic arithmetic>
struct ArithmeticTraits;

template <class Element_>
struct ArithmeticTraits16 {
  using Element = Element_;
  static constexpr int kParts = 1;  // operands: high, and low where exact

  // Stores elements k and k + 1 (k even) of an operand. to: where k goes.
  static RNNFAST_DEVICE void store_pair(unsigned char* to, int /*part_bytes*/, float first, float second) {
    *reinterpret_cast<uint32_t*>(to) = pack<Element>(first, second);
  }
  static RNNFAST_DEVICE uint32_t high(uint32_t word) { return word; }
  static RNNFAST_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<Element>(sum, a, b0, b1);
  }
};

template <bool kExact>
struct ArithmeticTraits32 {
  using Element = float;
  static constexpr int kParts = kExact ? 2 : 1;

  static RNNFAST_DEVICE uint32_t high(uint32_t word) { return to_tf32(__uint_as_float(word)); }
  // The rest of the word after `high`, rounded. The difference itself is exact.
  static RNNFAST_DEVICE uint32_t low(uint32_t word, uint32_t high) {
    return to_tf32(__uint_as_float(word) - __uint_as_float(high));
  }
  static RNNFAST_DEVICE void store_pair(unsigned char* to, int part_bytes, float first, float second) {
    const uint2 bits = {__float_as_uint(first), __float_as_uint(second)};
    const uint2 leading = {high(bits.x), high(bits.y)};
    *reinterpret_cast<uint2*>(to) = leading;
    if constexpr (kExact)
      *reinterpret_cast<uint2*>(to + part_bytes) = uint2{low(bits.x, leading.x), low(bits.y, leading.y)};
  }
  static RNNFAST_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<float>(sum, a, b0, b1);
  }
};

template <>
struct ArithmeticTraits<Arithmetic::kBfloat16> : ArithmeticTraits16<__nv_bfloat16> {};
template <>
struct ArithmeticTraits<Arithmetic::kHalf> : ArithmeticTraits16<__half> {};
template <>
struct ArithmeticTraits<Arithmetic::kTf32> : ArithmeticTraits32<false> {};
template <>
struct ArithmeticTraits<Arithmetic::kExact> : ArithmeticTraits32<true> {};

template <Arithmetic arithmetic>
using ElementOf = typename ArithmeticTraits<arithmetic>::Element;

// A pair of neighbours in shared memory as floats. Pairs are always aligned there.
template <class Element>
RNNFAST_DEVICE float2 load_shared_pair(const unsigned char* from) {
  if constexpr (sizeof(Element) == 2) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
    return {unpack_low<Element>(pair), unpack_high<Element>(pair)};
  } else {
    return *reinterpret_cast<const float2*>(from);
  }
}

// Elements at and at + 1 of a row in global memory; zeros from `size` on.
template <class Element>
RNNFAST_DEVICE float2 load_pair(const Element* row, int at, int size) {
  return {at < size ? to_float(row[at]) : 0.f, at + 1 < size ? to_float(row[at + 1]) : 0.f};
}

// Stores two neighbours of each plane, value(plane, 0) and value(plane, 1). to: where the first one of plane 0 goes.
// Planes are plane_size apart. rest: the elements of a plane from there on. aligned: see pairs_aligned.
template <int kPlanes, class Element, class Value>
RNNFAST_DEVICE void store_pairs(Element* to, int plane_size, int rest, bool aligned, Value value) {
  if (rest <= 0) return;
  if (aligned) {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      if constexpr (sizeof(Element) == 2)
        *reinterpret_cast<uint32_t*>(to + plane * plane_size) = pack<Element>(value(plane, 0), value(plane, 1));
      else
        *reinterpret_cast<float2*>(to + plane * plane_size) = float2{value(plane, 0), value(plane, 1)};
    }
  } else {
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      to[plane * plane_size] = from_float<Element>(value(plane, 0));
      if (rest > 1) to[plane * plane_size + 1] = from_float<Element>(value(plane, 1));
    }
  }
}

// Column j of [unit half][column] values, for store_pairs of one plane.
RNNFAST_DEVICE auto column_of(const float (&values)[4], int j) {
  return [&values, j](int, int half) { return values[2 * half + j]; };
}

// Whether two neighbours, the first one even, may be stored as one word, in rows of `size` elements from base on. True
// for null, where nothing is stored.
template <class Element>
RNNFAST_DEVICE bool pairs_aligned(const Element* base, int size) {
  return size % 2 == 0 && reinterpret_cast<uintptr_t>(base) % (2 * sizeof(Element)) == 0;
}

}  // namespace rnnfast::cuda
