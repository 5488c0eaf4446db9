// How weights come from global memory into WeightTiles: as they are (forward) or transposed (backward).
#pragma once

#include "batch_tile.cuh"

namespace rnnfast::cuda {

// A warp's 16 rows of weights in shared memory: the way on which they are read by whole rows and whatever their
// alignment, and come out as the 16 bytes that a lane needs. Used once per tile, before the loop over time.
template <Product product, int kDepth>
struct WeightStage {
  using Element = ElementOf<product>;
  static constexpr int kMost = kDepth * int(sizeof(Element));
  // 32 more than a multiple of 64: rows 2 apart, which 8 lanes read together, lie 64 bytes apart in the banks.
  static constexpr int kRowBytes = round_up(kMost, 64) + 32;
  static constexpr int kBytes = kTileRows * kRowBytes;
  static constexpr int kGroup = copy_group(kMost, kLanes* kColumns);

  unsigned char* stage;  // this warp's kBytes
  Lane lane;

  // Rows 0 ... count - 1 (at most 16) of `width` elements each; zeros elsewhere.
  RNNFAST_DEVICE void fill(const Element* rows, int count, int width) const {
    const int thread = int(threadIdx.x) % kLanes, bytes = width * int(sizeof(Element));
    warp_sync();  // the reads of the tile before
    for (int at = thread * kPieceBytes; at < kBytes; at += kLanes * kPieceBytes)
      *reinterpret_cast<uint4*>(stage + at) = uint4{0, 0, 0, 0};
    warp_sync();
    const int piece = piece_bytes(rows, bytes);
    for (int row = thread / kGroup; row < min(count, kTileRows); row += kLanes / kGroup)
      copy_plane<kGroup, kMost>(stage + row * kRowBytes,
                                reinterpret_cast<const unsigned char*>(rows) + int64_t(row) * bytes, bytes, piece,
                                thread % kGroup);
    copy_commit();
    copy_wait<0>();
    warp_sync();
  }
  RNNFAST_DEVICE uint4 read(int half, int chunk) const {
    return *reinterpret_cast<const uint4*>(stage + (2 * lane.group + half) * kRowBytes + chunk * kChunkBytes +
                                           lane.member * kPieceBytes);
  }
};

// Transposed weights: the row of a tile is a column of [kPlanes * rows, columns], its depth runs over the rows of each
// plane, padded to kRows. The 8 groups of a warp read neighbouring columns: whole 32-byte sectors, so no staging.
template <Product product, int kRows>
struct TransposedWeights {
  using Element = ElementOf<product>;
  static constexpr int kPieceElements = kPieceBytes / int(sizeof(Element));
  static constexpr int kChunkElements = kChunkBytes / int(sizeof(Element));
  static constexpr int kPlaneChunks = kRows / kChunkElements;

  const Element* weight;
  int rows, columns;

  // This lane's 16 bytes of `column` in a chunk of the depth.
  RNNFAST_DEVICE uint4 read(Lane lane, int column, int chunk) const {
    const int plane = chunk / kPlaneChunks;
    const int first = chunk % kPlaneChunks * kChunkElements + lane.member * kPieceElements;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kPieceElements; ++i) {
      const int row = first + i;
      if (row >= rows || column >= columns) continue;
      const Element* at = weight + (int64_t(plane) * rows + row) * columns + column;
      if constexpr (sizeof(Element) == 2)
        words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(at)) << (i % 2 * 16);
      else
        words[i] = __float_as_uint(*at);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

}  // namespace rnnfast::cuda
