// How the CTAs of a group exchange values: a buffer in global memory in which the data is its own signal.
//
// Shapes      A slot for every step (two with a projection) holds one batch tile's operand of a product, of all units.
//             A slot is chunks of 64 bytes of the depth, 8 columns of each chunk side by side, so a warp loads 512
//             bytes in a row. Chunks are in the order in which one warp after the other multiplies them. A warp has
//             kHidden / kWarps units of every plane.
// Sync        All slots are filled with 0xFF before the launch. An owner stores each word of a slot once, and never as
//             0xFFFFFFFF. A reader loads a word until it is something else; then it is the value. The order in which
//             stores become visible does not matter, and torn 16-byte loads do no harm: no flag, no fence.
//             A wait is bounded (Spin): if a member never runs, the launch ends with an error.
//             0xFFFFFFFF is one NaN, or two of 16 bits. Stores turn it into another NaN, so NaNs pass like numbers.
// Limits      The workspace and what it costs: docs/design/cuda.md.
#pragma once

#include "cuda/device/fragments.cuh"

namespace rnnfast::cuda {

constexpr uint32_t kMissing = 0xFFFFFFFFu;

// Fills the slots, by one-dimensional blocks. Piece: uint4.
template <class Piece>
__global__ void clear_exchange(Piece* exchange, int64_t pieces) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pieces; i += int64_t(gridDim.x) * blockDim.x)
    exchange[i] = Piece{kMissing, kMissing, kMissing, kMissing};
}

template <Arithmetic arithmetic, int kPlanes, int kHidden, int kWarps>
struct Exchange {
  using Element = ElementOf<arithmetic>;
  using Numbers = ArithmeticTraits<arithmetic>;
  static constexpr int kSize = int(sizeof(Element));
  static constexpr int kDepth = kHidden / kWarps;  // units of a warp
  static constexpr int kPlaneChunks = kDepth * kSize / kChunkBytes;
  static constexpr int kChunks = kPlanes * kPlaneChunks;  // of a warp
  static constexpr int kChunkStride = kColumns * kChunkBytes;
  static constexpr int kSlotBytes = kWarps * kChunks * kChunkStride;
  // Loads under way at once, of 16 bytes per lane. 8 of them cover the latency of L2 at its bandwidth per SM (an
  // estimate). Backward has registers for 6.
  static constexpr int kAhead = min_of(kChunks, kPlanes == 1 ? 8 : 6);
  // How many missing pieces are loaded again together. Exact products have no registers for more.
  static constexpr int kAgain = Numbers::kParts == 2 ? min_of(kAhead, 3) : kAhead;
  static_assert(kHidden % kWarps == 0 && kDepth * kSize % kChunkBytes == 0);

  // Stores a unit's value of a plane. All lanes of a warp call it. Lane `lane ^ kNeighbour` has the neighbouring unit,
  // whose number differs in bit 0.
  template <int kNeighbour>
  static RNNFAST_DEVICE void store(unsigned char* slot, int column, int plane, int unit, float value) {
    const int chunk = unit / kDepth * kChunks + plane * kPlaneChunks + unit % kDepth * kSize / kChunkBytes;
    unsigned char* const to = slot + chunk * kChunkStride + column * kChunkBytes + unit * kSize % kChunkBytes;
    if constexpr (kSize == 2) {
      const float other = shuffle_xor(value, kNeighbour);
      if (unit % 2 == 0) store_word(to, pack<Element>(value, other));
    } else {
      store_word(to, __float_as_uint(value));
    }
  }

  // A warp's part of a slot as the B operand, for WeightTiles::multiply. Units from `units` on are zeros.
  class Reader {
   public:
    RNNFAST_DEVICE Reader(const unsigned char* slot, Lane lane, int units)
        : first_(slot + lane.warp * kChunks * kChunkStride + lane.group * kChunkBytes + lane.member * kPieceBytes),
          units_(units - lane.warp * kDepth - lane.member * (kPieceBytes / kSize)) {
#pragma unroll
      for (int chunk = 0; chunk < kAhead; ++chunk) pieces_[chunk] = load(chunk);
    }

    RNNFAST_DEVICE uint4 operator()(int part, int chunk) {
      if (part == 0) take(chunk);
      const uint32_t words[4] = {taken_.x, taken_.y, taken_.z, taken_.w};
      uint32_t result[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        result[i] = Numbers::high(words[i]);
        if constexpr (Numbers::kParts == 2) result[i] = part ? Numbers::low(words[i], result[i]) : result[i];
      }
      return {result[0], result[1], result[2], result[3]};
    }

   private:
    RNNFAST_DEVICE void take(int chunk) {
      uint4& piece = pieces_[chunk % kAhead];
      while (any_lane(missing(piece))) {  // all lanes leave together: an mma comes next
        spin_.again();
        // The next pieces were loaded as early, so they are missing too: one trip to L2 for all of them.
#pragma unroll
        for (int next = chunk; next < min_of(chunk + kAgain, kChunks); ++next) {
          uint4& late = pieces_[next % kAhead];
          if (missing(late)) late = load(next);
        }
      }
      taken_ = piece;
      if (chunk + kAhead < kChunks) piece = load(chunk + kAhead);
    }
    RNNFAST_DEVICE uint4 load(int chunk) const {
      if (chunk % kPlaneChunks * (kChunkBytes / kSize) >= units_) return {0, 0, 0, 0};
      return load_relaxed(reinterpret_cast<const uint4*>(first_ + chunk * kChunkStride));
    }
    static RNNFAST_DEVICE bool missing(uint4 piece) {
      return piece.x == kMissing || piece.y == kMissing || piece.z == kMissing || piece.w == kMissing;
    }

    const unsigned char* first_;
    int units_;  // that exist from the lane's first one on
    uint4 pieces_[kAhead], taken_;
    Spin spin_;
  };

 private:
  static RNNFAST_DEVICE void store_word(unsigned char* to, uint32_t word) {
    // The quiet NaN without its sign, twice for 16 bits.
    constexpr uint32_t kOtherNan = kSize == 2 ? 0x7FFF7FFFu : 0x7FFFFFFFu;
    store_relaxed(reinterpret_cast<uint32_t*>(to), word == kMissing ? kOtherNan : word);
  }
};

// Where the warps of a CTA add up their partial sums: [2][warp][tile][128], with a barrier between stores and loads.
// The next step uses the other half, so one barrier per step is enough.
template <int kTiles, int kWarps>
struct PartialSums {
  static constexpr int kTileBytes = kTileRows * kColumns * int(sizeof(float));
  static constexpr int kHalfBytes = kWarps * kTiles * kTileBytes;
  static constexpr int kBytes = 2 * kHalfBytes;

  static RNNFAST_DEVICE void store(unsigned char* half, Lane lane, const float (&sum)[kTiles][4]) {
    unsigned char* const to = half + lane.warp * kTiles * kTileBytes + int(threadIdx.x) % kLanes * kPieceBytes;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      *reinterpret_cast<float4*>(to + tile * kTileBytes) = {sum[tile][0], sum[tile][1], sum[tile][2], sum[tile][3]};
  }
  // The sum over all warps, in their order. place: where in a tile, lane place / 4 of a product, its sum place % 4.
  static RNNFAST_DEVICE float load(const unsigned char* half, int tile, int place) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum += *reinterpret_cast<const float*>(half + (warp * kTiles + tile) * kTileBytes + place * int(sizeof(float)));
    return sum;
  }
};

// The cells of a CTA, kUnits units of 8 sequences, spread over its threads. A thread has the cell whose sums lie at its
// place in PartialSums, so neighbouring units are two lanes apart.
template <int kUnits, int kThreads>
struct CellPlaces {
  static constexpr int kNeighbour = 2;
  static constexpr int kCells = kUnits * kColumns;
  static constexpr int kOwn = (kCells + kThreads - 1) / kThreads;  // of a thread
  static constexpr int kTileCells = kTileRows * kColumns;

  // Whether this thread has an i-th cell. The answer is the same for all lanes of a warp.
  static RNNFAST_DEVICE bool exists(int i) { return int(threadIdx.x) + i * kThreads < kCells; }
  static RNNFAST_DEVICE int block(int i) { return (int(threadIdx.x) + i * kThreads) / kTileCells; }  // of 16 units
  static RNNFAST_DEVICE int place(int i) { return (int(threadIdx.x) + i * kThreads) % kTileCells; }
  static RNNFAST_DEVICE int unit(int i) {
    return block(i) * kTileRows + 2 * (place(i) / kColumns / 2) + place(i) % 4 / 2;
  }
  static RNNFAST_DEVICE int column(int i) { return 2 * (place(i) / 4 % 4) + place(i) % 2; }
};

}  // namespace rnnfast::cuda
