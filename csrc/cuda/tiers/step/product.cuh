// The matrix product of tier step: sums[row][b] = Σ_k weight[row][k] state[b][k] for one tile, in shared memory.
//
// Shapes      A tile is kUnits units with all their kPlanes planes (gates), times kBatch rows of the batch. The weight
//             is the A operand (rows of 16), the state the B operand (columns of 8): a small batch wastes little of an
//             mma. K is contiguous in both. They pass through shared memory as slabs of 64 bytes of K:
//               stage [kStages] -> slab [kSlabs] -> row [kRows + kBatch] -> 64 bytes
// Ownership   Large tile: 2 x 2 warps, a quarter of the tile each. Small tile: 4 warps, a quarter of K each; the reader
//             of the sums adds the 4 parts, always in the same order.
//             A lane of an mma loads 16 contiguous bytes of a row, and 8 lanes load two whole rows: one 128-bit load
//             per fragment, without bank conflicts or padding. This permutes K within a slab, alike for both operands.
//             16 bytes are two operand words for each of two mma, with 16-bit and with TF32 elements.
//             Exact products walk the same fragments with FFMA. Their lanes start at different quarters of a slab,
//             which avoids bank conflicts of the weight.
// Sync        One barrier per stage of K. cp.async fills kStages - 1 stages ahead. Before compute capability 8.0 the
//             copies are ordinary ones at the same place. The function ends after a barrier: the CTA sees all sums.
// Limits      Weight rows are 16-byte aligned, with K padded by zeros (by the host). A state that is not aligned is
//             copied element by element.
#pragma once

#include "cuda/device/arithmetic.cuh"
#include "cuda/plan/plan.h"

namespace rnnfast::cuda {

constexpr int kStepThreads = 32 * kStepWarps;
constexpr int kPieceBytes = 16;

template <Arithmetic kArithmetic_, int kPlanes_, bool kLarge>
struct StepTile {
  static constexpr Arithmetic kArithmetic = kArithmetic_;
  using Element = ElementOf<kArithmetic>;
  static constexpr int kPlanes = kPlanes_;
  static constexpr StepTileSize kSize = step_tile(kPlanes, kLarge);
  static constexpr int kUnits = kSize.units, kBatch = kSize.batch, kSplit = kSize.split, kSlabs = kSize.slabs;
  static constexpr int kStages = kStepStages;

  static constexpr int kRows = kPlanes * kUnits;
  static constexpr int kWarpsAlongRows = kLarge ? 2 : 1, kWarpsAlongBatch = kLarge ? 2 : 1;
  static constexpr int kRowTiles = kRows / 16 / kWarpsAlongRows;     // m16 tiles of a warp
  static constexpr int kBatchTiles = kBatch / 8 / kWarpsAlongBatch;  // n8 tiles of a warp
  static constexpr int kSumStride = kBatch + 1;                      // odd, against bank conflicts
  static constexpr int kSharedBytes = step_shared_bytes(kPlanes, kLarge);
  static_assert(kSharedBytes >= kSplit * kRows * kSumStride * int(sizeof(float)), "the sums take the pipeline's place");
  static constexpr int kCells = kUnits * kBatch / kStepThreads;  // (unit, batch row) pairs of a thread
};

// Weight rows of a tile. Unit u < units of plane p is at first + (p * plane_rows + u) * stride.
template <class Element>
struct WeightRows {
  const Element* first;
  int64_t stride;      // elements; rows start at multiples of 16 bytes
  int64_t plane_rows;  // rows from one plane to the next
  int64_t units;       // left in this tile and after it
};

// 16 bytes of a slab as operand words: 16-bit elements unchanged, floats rounded.
template <Arithmetic kArithmetic>
RNNFAST_DEVICE uint4 operand(uint4 words) {
  if constexpr (kArithmetic == Arithmetic::kTf32) {
    words.x = to_tf32(__uint_as_float(words.x));
    words.y = to_tf32(__uint_as_float(words.y));
    words.z = to_tf32(__uint_as_float(words.z));
    words.w = to_tf32(__uint_as_float(words.w));
  }
  return words;
}

// sum += the products of 4 floats each.
RNNFAST_DEVICE void add_products(float& sum, float4 a, float4 b) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  sum = fmaf(a.w, b.w, sum);
}

// Copies 16 bytes of a state's row, from element k on; zeros beyond k_size. The row may be unaligned.
template <class Element>
RNNFAST_DEVICE void copy_unaligned(unsigned char* target, const Element* row, int64_t k, int64_t k_size) {
  constexpr int kCount = kPieceBytes / int(sizeof(Element));
  Element* const to = reinterpret_cast<Element*>(target);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = row && k + i < k_size ? row[k + i] : from_float<Element>(0.0f);
}

// Adds a slab's products to a warp's sums. Lane (group, quarter) holds rows group and group + 8, columns 2 * quarter
// and 2 * quarter + 1.
template <class Tile>
RNNFAST_DEVICE void multiply_slab(float (&sums)[Tile::kRowTiles][Tile::kBatchTiles][4], const unsigned char* slab,
                                  int warp_rows, int warp_batch, int group, int quarter) {
  using Element = typename Tile::Element;
  const unsigned char* const a = slab + warp_rows * kSlabBytes;
  const unsigned char* const b = slab + (Tile::kRows + warp_batch) * kSlabBytes;
  if constexpr (Tile::kArithmetic == Arithmetic::kExact) {
    const auto piece_of = [](const unsigned char* base, int row, int at) {
      return *reinterpret_cast<const float4*>(base + row * kSlabBytes + at * kPieceBytes);
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (i + group / 2) % 4;
#pragma unroll
      for (int n = 0; n < Tile::kBatchTiles; ++n) {
        const float4 left = piece_of(b, n * 8 + 2 * quarter, at);
        const float4 right = piece_of(b, n * 8 + 2 * quarter + 1, at);
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
          const float4 upper = piece_of(a, m * 16 + group, at);
          const float4 lower = piece_of(a, m * 16 + group + 8, at);
          add_products(sums[m][n][0], upper, left);
          add_products(sums[m][n][1], upper, right);
          add_products(sums[m][n][2], lower, left);
          add_products(sums[m][n][3], lower, right);
        }
      }
    }
  } else {
    const auto piece_of = [](const unsigned char* base, int row, int at) {
      return operand<Tile::kArithmetic>(*reinterpret_cast<const uint4*>(base + row * kSlabBytes + at * kPieceBytes));
    };
    uint4 state[Tile::kBatchTiles];
#pragma unroll
    for (int n = 0; n < Tile::kBatchTiles; ++n) state[n] = piece_of(b, n * 8 + group, quarter);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      const uint4 upper = piece_of(a, m * 16 + group, quarter), lower = piece_of(a, m * 16 + group + 8, quarter);
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int n = 0; n < Tile::kBatchTiles; ++n) {
        mma<Element>(sums[m][n], first, state[n].x, state[n].y);
        mma<Element>(sums[m][n], second, state[n].z, state[n].w);
      }
    }
  }
}

// row_of(b): the state row of the tile's batch row b; null: zeros. aligned: rows are 16-byte aligned and k_size is a
// multiple of 16 bytes.
template <class Tile, class RowOf>
RNNFAST_DEVICE void step_product(unsigned char* shared, const WeightRows<typename Tile::Element>& weight, RowOf row_of,
                                 int64_t k_size, bool aligned) {
  using Element = typename Tile::Element;
  constexpr int kElements = kPieceBytes / int(sizeof(Element));
  constexpr int kPieces = Tile::kSlabs * kSlabBytes / kPieceBytes;  // of a row in a stage
  constexpr int kRowsPerPass = kStepThreads / kPieces;
  constexpr int kSlabRows = Tile::kRows + Tile::kBatch;
  constexpr int kStageBytes = Tile::kSlabs * kSlabRows * kSlabBytes;
  static_assert(Tile::kUnits % kRowsPerPass == 0 && Tile::kBatch % kRowsPerPass == 0);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;

  // ---- filling: a thread copies one piece of every kRowsPerPass-th row
  const int piece = thread % kPieces, first_row = thread / kPieces;
  const Element* state_rows[Tile::kBatch / kRowsPerPass];
#pragma unroll
  for (int i = 0; i < Tile::kBatch / kRowsPerPass; ++i) state_rows[i] = row_of(first_row + i * kRowsPerPass);

  const auto fill = [&](int chunk) {
    unsigned char* const target = shared + (chunk % Tile::kStages) * kStageBytes +
                                  ((piece / 4) * kSlabRows + first_row) * kSlabBytes + (piece % 4) * kPieceBytes;
    const int64_t k = (int64_t(chunk) * kPieces + piece) * kElements;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kRowsPerPass; ++i) {
      const int row = i * kRowsPerPass, plane = row / Tile::kUnits, unit = row % Tile::kUnits + first_row;
      const bool valid = k < k_size && unit < weight.units;
      const Element* const from = weight.first + (plane * weight.plane_rows + unit) * weight.stride + k;
      copy_async<kPieceBytes>(target + row * kSlabBytes, valid ? from : weight.first, valid);
    }
#pragma unroll
    for (int i = 0; i < Tile::kBatch / kRowsPerPass; ++i) {
      unsigned char* const to = target + (Tile::kRows + i * kRowsPerPass) * kSlabBytes;
      const Element* const row = state_rows[i];
      if (aligned) {
        const bool valid = row && k < k_size;
        copy_async<kPieceBytes>(to, valid ? row + k : weight.first, valid);
      } else {
        copy_unaligned(to, row, k, k_size);
      }
    }
  };

  // ---- computing
  const int group = lane / 4, quarter = lane % 4;
  const int part = Tile::kSplit > 1 ? warp : 0;
  const int warp_rows = Tile::kSplit > 1 ? 0 : warp % Tile::kWarpsAlongRows * Tile::kRowTiles * 16;
  const int warp_batch = Tile::kSplit > 1 ? 0 : warp / Tile::kWarpsAlongRows * Tile::kBatchTiles * 8;
  float sums[Tile::kRowTiles][Tile::kBatchTiles][4] = {};

  const int chunks = int((k_size + kPieces * kElements - 1) / (kPieces * kElements));
#pragma unroll
  for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) {
    if (chunk < chunks) fill(chunk);
    copy_commit();
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<Tile::kStages - 2>();
    block_sync();  // this stage is filled, and nobody reads any more from the one that is filled next
    if (chunk + Tile::kStages - 1 < chunks) fill(chunk + Tile::kStages - 1);
    copy_commit();
    const unsigned char* const stage = shared + (chunk % Tile::kStages) * kStageBytes;
    if constexpr (Tile::kSplit > 1) {
      multiply_slab<Tile>(sums, stage + warp * kSlabRows * kSlabBytes, warp_rows, warp_batch, group, quarter);
    } else {
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab)
        multiply_slab<Tile>(sums, stage + slab * kSlabRows * kSlabBytes, warp_rows, warp_batch, group, quarter);
    }
  }
  copy_wait<0>();
  block_sync();  // from here on, the pipeline's memory is free for the sums

  float* const result = reinterpret_cast<float*>(shared) + part * Tile::kRows * Tile::kSumStride;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < Tile::kBatchTiles; ++n) {
      float* const at = result + (warp_rows + m * 16 + group) * Tile::kSumStride + warp_batch + n * 8 + 2 * quarter;
      at[0] = sums[m][n][0];
      at[1] = sums[m][n][1];
      at[8 * Tile::kSumStride] = sums[m][n][2];
      at[8 * Tile::kSumStride + 1] = sums[m][n][3];
    }
  block_sync();
}

// The sum of a plane for unit `unit` and batch row `b` of the tile.
template <class Tile>
RNNFAST_DEVICE float sum_at(const unsigned char* shared, int plane, int unit, int b) {
  const float* const sums = reinterpret_cast<const float*>(shared);
  float total = 0.0f;
#pragma unroll
  for (int part = 0; part < Tile::kSplit; ++part)
    total += sums[((part * Tile::kPlanes + plane) * Tile::kUnits + unit) * Tile::kSumStride + b];
  return total;
}

}  // namespace rnnfast::cuda
