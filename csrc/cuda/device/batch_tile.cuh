// A batch tile's sequences: which rows they have at a time, and how rows come from global into shared memory ahead.
//
// Tensors of rows keep PyTorch's layout, plane after plane of hidden_size elements: [rows, planes * H]. A ring of
// a few stages in shared memory holds the coming steps' rows. All threads copy them together, by cp.async in 16-byte
// pieces; a thread copies other units than it computes. The barrier that ends a step makes a stage visible to all.
// In a stage a plane begins at a multiple of 64 bytes, so lanes read aligned pairs even where H is odd. cp.async needs
// source and destination aligned alike, to 4 bytes at least: where H is odd, pieces are narrower, down to one element.
#pragma once

#include "cuda/device/fragments.cuh"

namespace rnnfast::cuda {

// Stages of the ring. A copy has one step less than that to arrive: 0.75 us, the latency of a busy DRAM, where the
// shortest step takes 0.25 us (an estimate). Exact steps take over twice as long, and their weights need the memory.
constexpr int ring_stages(Arithmetic arithmetic) { return arithmetic == Arithmetic::kExact ? 3 : 4; }

// 8 neighbouring sequences in one direction. Sequences beyond the batch have length 0.
struct BatchTile {
  const int64_t* offsets;
  const int32_t* lengths;
  int first, batch, steps_in_all, direction;
  int steps;  // of the longest sequence: the loop's length

  RNNFAST_DEVICE BatchTile(const Shape& shape, int tile, int direction_)
      : offsets(shape.offsets),
        lengths(shape.lengths),
        first(tile * kColumns),
        batch(shape.batch),
        steps_in_all(shape.steps),
        direction(direction_),
        steps(0) {
    for (int column = 0; column < kColumns; ++column) steps = max(steps, length(column));
  }
  RNNFAST_DEVICE int length(int column) const {
    if (first + column >= batch) return 0;
    return lengths ? lengths[first + column] : steps_in_all;
  }
  // The time of a step. Backward walks against the direction.
  RNNFAST_DEVICE int time(int step, bool against = false) const {
    return (direction == 1) != against ? steps - 1 - step : step;
  }
  // The time of step 0. 0 where no sequence has a step; no length exceeds it then. (The max costs registers in time().)
  RNNFAST_DEVICE int first_time(bool against) const { return max(time(0, against), 0); }
  // The row of the tile's first sequence. Times outside the loop become its ends; nobody uses those rows.
  RNNFAST_DEVICE int64_t row(int t) const {
    t = min(max(t, 0), steps - 1);
    return (offsets ? offsets[t] : int64_t(t) * batch) + first;
  }
};

// The widest piece that divides the address and all distances (in bytes) of a copy.
RNNFAST_DEVICE int piece_bytes(const void* base, int64_t distances) {
  const int64_t bits = int64_t(reinterpret_cast<uintptr_t>(base)) | distances | kPieceBytes;
  return int(bits & -bits);
}

// kGroup threads copy a plane in turns, piece by piece. This copies one thread's part, in pieces of 16 bytes, without
// branches. bytes: from its first piece to the plane's end. kMost: the most bytes of a plane.
template <int kGroup, int kMost>
RNNFAST_DEVICE void copy_wide(unsigned char* to, const unsigned char* from, int bytes) {
#pragma unroll
  for (int at = 0; at < kMost; at += kGroup * kPieceBytes)
    if (at < bytes) copy_async<kPieceBytes>(to + at, from + at);
}
// The same in narrower pieces.
template <int kGroup>
RNNFAST_DEVICE void copy_narrow(unsigned char* to, const unsigned char* from, int bytes, int piece) {
#pragma unroll 1
  for (int at = 0; at < bytes; at += kGroup * piece) {
    if (piece == 8)
      copy_async<8>(to + at, from + at);
    else if (piece == 4)
      copy_async<4>(to + at, from + at);
    else
      *reinterpret_cast<uint16_t*>(to + at) = *reinterpret_cast<const uint16_t*>(from + at);
  }
}

// How many neighbouring threads copy one plane: a power of two. The number of such groups is a multiple of kColumns, so
// a thread copies from one column only.
RNNFAST_INLINE constexpr int copy_group(int plane_bytes, int threads) {
  int group = kLanes;
  while (group > 1 && (group * kPieceBytes > plane_bytes || threads % (group * kColumns) != 0)) group /= 2;
  return group;
}

// The rows of one tensor, a step at a time, into the ring. kWidth: the padded H.
template <class Element, int kPlanes, int kWidth, int kThreads>
struct RowStream {
  static constexpr int kPlaneBytes = kWidth * int(sizeof(Element));
  // 16 more than a multiple of 64. A warp reads 4 columns together, 2 apart: they lie 32 bytes apart in the banks.
  static constexpr int kColumnBytes = kPlanes * kPlaneBytes + 16;
  static constexpr int kStageBytes = round_up(kColumns * kColumnBytes, 128);
  static constexpr int kGroup = copy_group(kPlaneBytes, kThreads);
  static constexpr int kGroups = kThreads / kGroup;
  static_assert(kThreads % kGroup == 0 && kGroups % kColumns == 0);

  const unsigned char* source;  // this thread's first piece in row 0 of the tile
  int row_bytes, width_bytes, plane_bytes, piece;

  RowStream() = default;
  // `rows`: [N, row_size]. Copies kPlanes planes of `width` elements from its first element on.
  RNNFAST_DEVICE RowStream(const Element* rows, int row_size, int width) : RowStream(rows, row_size, width, width) {}
  // The same of planes that are `plane_size` apart.
  RNNFAST_DEVICE RowStream(const Element* rows, int row_size, int width, int plane_size)
      : row_bytes(row_size * int(sizeof(Element))),
        width_bytes(width * int(sizeof(Element))),
        plane_bytes(plane_size * int(sizeof(Element))),
        piece(piece_bytes(rows, row_bytes | width_bytes | plane_bytes)) {
    source = reinterpret_cast<const unsigned char*>(rows) + column() * int64_t(row_bytes) +
             first_plane() * plane_bytes + member() * piece;
  }

  static RNNFAST_DEVICE int column() { return int(threadIdx.x) / kGroup % kColumns; }
  // A stream of 32 threads may be each warp's own.
  static RNNFAST_DEVICE int first_plane() {
    return (kThreads == kLanes ? int(threadIdx.x) % kLanes : int(threadIdx.x)) / kGroup / kColumns;
  }
  static RNNFAST_DEVICE int member() { return int(threadIdx.x) % kGroup; }

  // Begins to copy this thread's part of column column(): `row` is that of the tile's first sequence.
  RNNFAST_DEVICE void fetch(unsigned char* stage, int64_t row, bool wanted) const {
    constexpr int kPlaneStep = kGroups / kColumns;
    const unsigned char* from = source + row * row_bytes;
    unsigned char* to = stage + column() * kColumnBytes + first_plane() * kPlaneBytes + member() * piece;
    const int bytes = wanted ? width_bytes - member() * piece : 0;
    // This thread's bytes of the plane `plane` further on. Where planes divide evenly, every plane exists.
    const auto part = [&](int plane) {
      return kPlanes % kPlaneStep == 0 || plane + first_plane() < kPlanes ? bytes : 0;
    };
    if (piece == kPieceBytes) [[likely]] {
#pragma unroll
      for (int plane = 0; plane < kPlanes; plane += kPlaneStep)
        copy_wide<kGroup, kPlaneBytes>(to + plane * kPlaneBytes, from + plane * plane_bytes, part(plane));
    } else {
#pragma unroll 1
      for (int plane = 0; plane < kPlanes; plane += kPlaneStep)
        copy_narrow<kGroup>(to + plane * kPlaneBytes, from + plane * plane_bytes, part(plane), piece);
    }
  }

  // Writes a pair to where read() finds it, for rows that fetch() does not copy.
  static RNNFAST_DEVICE void put(unsigned char* stage, int column, int unit, float2 pair) {
    unsigned char* to = stage + column * kColumnBytes + unit * int(sizeof(Element));
    if constexpr (sizeof(Element) == 2)
      *reinterpret_cast<uint32_t*>(to) = pack<Element>(pair.x, pair.y);
    else
      *reinterpret_cast<float2*>(to) = pair;
  }

  static RNNFAST_DEVICE float read_one(const unsigned char* stage, int column, int plane, int unit) {
    return to_float(reinterpret_cast<const Element*>(stage + column * kColumnBytes + plane * kPlaneBytes)[unit]);
  }
  // Units unit and unit + 1 (unit even) of a plane.
  static RNNFAST_DEVICE float2 read(const unsigned char* stage, int column, int plane, int unit) {
    return load_shared_pair<Element>(stage + column * kColumnBytes + plane * kPlaneBytes + unit * int(sizeof(Element)));
  }
};

// Zeros to a multiple of 16 bytes of shared memory, by all threads of the CTA.
RNNFAST_DEVICE void zero_shared(unsigned char* to, int bytes, int threads) {
  for (int at = int(threadIdx.x) * kPieceBytes; at < bytes; at += threads * kPieceBytes)
    *reinterpret_cast<uint4*>(to + at) = uint4{0, 0, 0, 0};
}

// Zeros to the rows beyond each sequence's length, which exist in padded input: `size` elements of each row of
// [N, row_size]. A warp fills a row.
template <class Element>
RNNFAST_DEVICE void zero_tails(const BatchTile& tile, Element* rows, int64_t row_size, int64_t size, Lane lane,
                               int warps) {
  if (rows == nullptr || tile.lengths == nullptr || tile.offsets != nullptr) return;
  for (int column = 0; column < kColumns && tile.first + column < tile.batch; ++column)
    for (int t = tile.length(column) + lane.warp; t < tile.steps_in_all; t += warps) {
      Element* row = rows + (int64_t(t) * tile.batch + tile.first + column) * row_size;
      for (int64_t i = int(threadIdx.x) % kLanes; i < size; i += kLanes) row[i] = from_float<Element>(0.f);
    }
}

}  // namespace rnnfast::cuda
