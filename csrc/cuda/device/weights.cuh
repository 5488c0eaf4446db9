// How weights come from global memory into WeightTiles: unchanged (forward) or transposed (backward).
//
// Each warp takes its weights through shared memory, for itself. So it reads whole rows of any alignment, padding is
// zero, and each lane picks the elements that it needs. This runs before the loop over time, in space that operands and
// ring use later.
#pragma once

#include "cuda/device/batch_tile.cuh"

namespace rnnfast::cuda {

// Copies `count` rows of `width` elements, `stride` elements apart, to stage + offset_of(row), by one warp. First it
// zeros stage_bytes of the stage. kMost: the largest width in bytes.
template <int kMost, class Element, class OffsetOf>
RNNFAST_DEVICE void stage_rows(unsigned char* stage, int stage_bytes, const Element* rows, int stride, int count,
                               int width, OffsetOf offset_of) {
  constexpr int kGroup = copy_group(kMost, kLanes * kColumns), kSize = int(sizeof(Element));
  const int lane = int(threadIdx.x) % kLanes;
  warp_sync();  // after the reads of the tile before
  for (int at = lane * kPieceBytes; at < stage_bytes; at += kLanes * kPieceBytes)
    *reinterpret_cast<uint4*>(stage + at) = uint4{0, 0, 0, 0};
  warp_sync();
  const int piece = piece_bytes(rows, (stride | width) * kSize);
  const int first = lane % kGroup * piece;
#pragma unroll 1
  for (int row = lane / kGroup; row < count; row += kLanes / kGroup) {
    unsigned char* to = stage + offset_of(row) + first;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(rows + int64_t(row) * stride) + first;
    if (piece == kPieceBytes)
      copy_wide<kGroup, kMost>(to, from, width * kSize - first);
    else
      copy_narrow<kGroup>(to, from, width * kSize - first, piece);
  }
  copy_commit();
  copy_wait<0>();
  warp_sync();
}

// A tile's 16 rows of weights.
template <Arithmetic arithmetic, int kDepth>
struct RowStage {
  using Element = ElementOf<arithmetic>;
  static constexpr int kMost = kDepth * int(sizeof(Element));
  // 32 more than a multiple of 64: rows 2 apart, which 8 lanes read together, lie 64 bytes apart in the banks.
  static constexpr int kRowBytes = round_up(kMost, 64) + 32;
  static constexpr int kBytes = kTileRows * kRowBytes;

  // Up to 16 rows of [.., width]; `count` of them exist.
  static RNNFAST_DEVICE void fill(unsigned char* stage, const Element* rows, int count, int width) {
    fill(stage, rows, width, count, width);
  }
  // The same of the first `width` elements of rows that are `stride` apart; none where width <= 0.
  static RNNFAST_DEVICE void fill(unsigned char* stage, const Element* rows, int stride, int count, int width) {
    stage_rows<kMost>(stage, kBytes, rows, stride, width > 0 ? min(count, kTileRows) : 0, min(width, kDepth),
                      [](int row) { return row * kRowBytes; });
  }
  // The lane's 16 bytes of each of its two rows of the tile.
  static RNNFAST_DEVICE void read(const unsigned char* stage, Lane lane, int chunk, uint4& first, uint4& second) {
    const unsigned char* at = stage + 2 * lane.group * kRowBytes + chunk * kChunkBytes + lane.member * kPieceBytes;
    first = *reinterpret_cast<const uint4*>(at);
    second = *reinterpret_cast<const uint4*>(at + kRowBytes);
  }
};

// A tile of transposed weights: 16 columns of up to kDepth rows. The rows are the depth.
template <Arithmetic arithmetic, int kDepth>
struct ColumnStage {
  using Element = ElementOf<arithmetic>;
  static constexpr int kMost = kTileRows * int(sizeof(Element));
  static constexpr int kRun = kPieceBytes / int(sizeof(Element));  // neighbouring rows of one lane
  // 32 more than a multiple of 128: the runs of the 4 members lie side by side in the banks.
  static constexpr int kRunBytes = kRun * kMost + 32;
  static constexpr int kBytes = kDepth / kRun * kRunBytes;

  // Up to 16 columns of [count, stride]; `width` of them exist.
  static RNNFAST_DEVICE void fill(unsigned char* stage, const Element* columns, int stride, int count, int width) {
    stage_rows<kMost>(stage, kBytes, columns, stride, width > 0 ? count : 0, min(width, kTileRows),
                      [](int row) { return row / kRun * kRunBytes + row % kRun * kMost; });
  }
  // The lane's two columns, in its kRun rows of a chunk of the depth.
  static RNNFAST_DEVICE void read(const unsigned char* stage, Lane lane, int chunk, uint4& first, uint4& second) {
    const unsigned char* run = stage + (chunk * 4 + lane.member) * kRunBytes + lane.group * 2 * int(sizeof(Element));
    uint32_t words[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 2) {
        const uint32_t even = *reinterpret_cast<const uint32_t*>(run + 2 * i * kMost);
        const uint32_t odd = *reinterpret_cast<const uint32_t*>(run + (2 * i + 1) * kMost);
        words[0][i] = (even & 0xFFFF) | odd << 16;
        words[1][i] = even >> 16 | (odd & 0xFFFF0000);
      } else {
        const uint2 both = *reinterpret_cast<const uint2*>(run + i * kMost);
        words[0][i] = both.x, words[1][i] = both.y;
      }
    }
    first = {words[0][0], words[0][1], words[0][2], words[0][3]};
    second = {words[1][0], words[1][1], words[1][2], words[1][3]};
  }
};

}  // namespace rnnfast::cuda
