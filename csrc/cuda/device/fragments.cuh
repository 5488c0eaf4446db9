// The two operands of a step's product: weights, which stay in registers, and state, which passes through shared
// memory.
//
// sum[16 rows, 8 columns] += weights[16, depth] state[depth, 8]. Rows are units (all gates of a unit in one lane),
// columns are sequences of the batch. A warp multiplies tiles of 16 rows. Lane 4 * group + member holds, of a tile:
//   sum      rows 2 * group and 2 * group + 1, columns 2 * member and 2 * member + 1: sum[2 * half + column]
//   weights  the same two rows ("halves"), a quarter of the depth: 16 bytes of each 64, from 16 * member on
// So neighbouring units lie in one lane and are stored as a pair. The order of the depth within an mma is free if both
// operands agree. In this order one 16-byte load gives a lane the state of two mmas, without ldmatrix.
#pragma once

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

constexpr int kColumns = 8;    // sequences of a batch tile: the n of mma.m16n8
constexpr int kTileRows = 16;  // units of a tile: its m
constexpr int kLanes = 32;
constexpr int kPieceBytes = 16;  // the widest load, store and cp.async
constexpr int kChunkBytes = 64;  // depth that one 16-byte load per lane covers: two mmas

RNNFAST_INLINE constexpr int max_of(int a, int b) { return a > b ? a : b; }
RNNFAST_INLINE constexpr int min_of(int a, int b) { return a < b ? a : b; }
RNNFAST_INLINE constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Lane {
  int warp = int(threadIdx.x) / kLanes;
  int group = int(threadIdx.x) % kLanes / 4;
  int member = int(threadIdx.x) % 4;
};

// [depth, 8 columns] in shared memory, column after column, once for each part (see arithmetic.cuh). Within 128 bytes
// of a column, its 16-byte pieces are permuted by the column's number. So neither the loads of 8 lanes (2 columns, 64
// bytes of each) nor the stores of a warp (4 columns, 16 units of each) meet in a bank.
template <Arithmetic arithmetic, int kDepth>
struct Operand {
  using Element = ElementOf<arithmetic>;
  static constexpr int kColumnBytes = round_up(kDepth * int(sizeof(Element)), 128);
  static constexpr int kPartBytes = kColumns * kColumnBytes;
  static constexpr int kBytes = kPartBytes * ArithmeticTraits<arithmetic>::kParts;

  static RNNFAST_DEVICE int swizzle(int column) { return (column >> 1 & 3) << 5 ^ (column & 1) << 6; }

  // Where element k (even) of a column lies, plus `chunks` of 64 bytes. In this form the part that depends on the lane
  // is the same for every even number of chunks.
  static RNNFAST_DEVICE int offset(int column, int k, int chunks = 0) {
    const int within = k * int(sizeof(Element)) + chunks % 2 * kChunkBytes;
    return column * kColumnBytes + (within ^ swizzle(column)) + chunks / 2 * (2 * kChunkBytes);
  }
  static RNNFAST_DEVICE void store_pair(unsigned char* operand, int offset, float first, float second) {
    ArithmeticTraits<arithmetic>::store_pair(operand + offset, kPartBytes, first, second);
  }

  // Where this lane's piece of chunk 0 is.
  static RNNFAST_DEVICE int lane_offset(Lane lane) {
    return lane.group * kColumnBytes + ((lane.member * kPieceBytes) ^ swizzle(lane.group));
  }
  static RNNFAST_DEVICE uint4 load(const unsigned char* operand, int lane_offset, int part, int chunk) {
    const int within = lane_offset ^ (chunk % 2 * kChunkBytes);  // chunk 0 has nothing in that bit
    return *reinterpret_cast<const uint4*>(operand + within + chunk / 2 * (2 * kChunkBytes) + part * kPartBytes);
  }
};

// A warp's kTiles tiles of weights, in up to kBudget registers of each lane. The rest (low parts first) lies in shared
// memory, in the order in which lanes read it.
constexpr int kWeightBudget = 128;  // of 255 registers: sums, states and addresses need the rest

template <Arithmetic arithmetic, int kTiles, int kDepth, int kWarps, int kBudget = kWeightBudget>
struct WeightTiles {
  using Numbers = ArithmeticTraits<arithmetic>;
  using State = Operand<arithmetic, kDepth>;
  static constexpr int kChunks = kDepth * int(sizeof(ElementOf<arithmetic>)) / kChunkBytes;
  static constexpr int kFragments = 2 * kChunks;  // fragment: the weights of one mma, 4 words of each lane
  static constexpr int kWords = 4 * kTiles * kFragments;
  static constexpr bool kHasLow = Numbers::kParts == 2;
  static constexpr bool kLowShared = kHasLow && 2 * kWords > kBudget;
  static constexpr int kHeld = min_of(kFragments, kBudget / (4 * kTiles));  // fragments of a tile in registers
  static constexpr int kFragmentBytes = kLanes * kPieceBytes;
  static constexpr int kSharedFragments = kFragments - kHeld + (kLowShared ? kFragments : 0);  // of a tile
  static constexpr int kSharedBytes = kWarps * kTiles * kSharedFragments * kFragmentBytes;
  // Independent sums. 4 of them hide the latency of an mma (33 cycles at one mma per 6.5, estimates). In exact products
  // they also keep each sum short: tensor cores truncate where a float addition rounds.
  static constexpr int kSplits = kTiles >= 4 ? (kHasLow ? 2 : 1) : kTiles == 1 ? 4 : 2;
  static constexpr int kCorrections = kTiles == 1 ? 4 : 1;  // sums of high * low + low * high

  uint32_t high[kTiles][max_of(kHeld, 1)][4];
  uint32_t low[kHasLow && !kLowShared ? kTiles : 1][kHasLow && !kLowShared ? kFragments : 1][4];
  unsigned char* shared;  // this lane's part of kSharedBytes

  // weights: kSharedBytes of shared memory for the weights that exceed the registers.
  RNNFAST_DEVICE void use_shared(unsigned char* weights, Lane lane) {
    shared = weights + lane.warp * (kSharedBytes / kWarps) + int(threadIdx.x) % kLanes * kPieceBytes;
  }

  // Loads `chunks` chunks of a tile, from first_chunk on. read(chunk, first, second), counted from there, gives this
  // lane's 16 bytes of its two rows: 4 words of weights each, as in memory.
  template <class Read>
  RNNFAST_DEVICE void load(int tile, int first_chunk, int chunks, Read read) {
#pragma unroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint4 first, second;
      read(chunk, first, second);
      put(tile, 2 * (first_chunk + chunk), first.x, second.x, first.y, second.y);
      put(tile, 2 * (first_chunk + chunk) + 1, first.z, second.z, first.w, second.w);
    }
  }

  // sum = weights * state. state: an Operand<arithmetic, kDepth>.
  RNNFAST_DEVICE void multiply(float (&sum)[kTiles][4], const unsigned char* state, int lane_offset) const {
    multiply(sum, [&](int part, int chunk) { return State::load(state, lane_offset, part, chunk); });
  }
  // The same. read(part, chunk) gives this lane's 16 bytes of the state, chunk by chunk, part 0 first.
  template <class Read>
  RNNFAST_DEVICE void multiply(float (&sum)[kTiles][4], Read read) const {
    float split[kSplits][kTiles][4] = {}, correction[kCorrections][kTiles][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 b = read(0, chunk);
      uint4 b_low;
      if constexpr (kHasLow) b_low = read(1, chunk);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int fragment = 2 * chunk + i;
        const uint32_t b0 = i ? b.z : b.x, b1 = i ? b.w : b.y;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t a[4];
          get_high(a, tile, fragment);
          Numbers::multiply(split[fragment % kSplits][tile], a, b0, b1);
          if constexpr (kHasLow) {
            float (&small)[4] = correction[fragment % kCorrections][tile];
            Numbers::multiply(small, a, i ? b_low.z : b_low.x, i ? b_low.w : b_low.y);
            get_low(a, tile, fragment);
            Numbers::multiply(small, a, b0, b1);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[tile][i] = kHasLow ? total(split, tile, i) + total(correction, tile, i) : total(split, tile, i);
      }
  }

 private:
  template <int kCount>
  static RNNFAST_DEVICE float total(const float (&split)[kCount][kTiles][4], int tile, int i) {
    if constexpr (kCount == 4) return (split[0][tile][i] + split[1][tile][i]) + (split[2][tile][i] + split[3][tile][i]);
    if constexpr (kCount == 2) return split[0][tile][i] + split[1][tile][i];
    return split[0][tile][i];
  }

  // Words in the order of the mma's A operand: both halves at the first 4 words of depth, then both at the next 4.
  RNNFAST_DEVICE void put(int tile, int fragment, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
    const uint32_t words[4] = {a0, a1, a2, a3};
    uint32_t leading[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) leading[i] = Numbers::high(words[i]);
    if (fragment >= kHeld) {
      *word(tile, fragment - kHeld) = uint4{leading[0], leading[1], leading[2], leading[3]};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) high[tile][fragment][i] = leading[i];
    }
    if constexpr (kHasLow) {
      uint32_t rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] = Numbers::low(words[i], leading[i]);
      if constexpr (kLowShared) {
        *word(tile, kFragments - kHeld + fragment) = uint4{rest[0], rest[1], rest[2], rest[3]};
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) low[tile][fragment][i] = rest[i];
      }
    }
  }
  RNNFAST_DEVICE uint4* word(int tile, int fragment) const {
    return reinterpret_cast<uint4*>(shared + (tile * kSharedFragments + fragment) * kFragmentBytes);
  }
  static RNNFAST_DEVICE void copy(uint32_t (&a)[4], uint4 words) {
    a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
  }
  RNNFAST_DEVICE void get_high(uint32_t (&a)[4], int tile, int fragment) const {
    if (fragment >= kHeld) {
      copy(a, *word(tile, fragment - kHeld));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = high[tile][fragment][i];
    }
  }
  RNNFAST_DEVICE void get_low(uint32_t (&a)[4], int tile, int fragment) const {
    if constexpr (kLowShared) {
      copy(a, *word(tile, kFragments - kHeld + fragment));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = low[tile][fragment][i];
    }
  }
};

}  // namespace rnnfast::cuda
