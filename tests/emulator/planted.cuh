// A recurrent loop in miniature, in three forms: right, and with one bug planted. test_emulator.py asserts that each
// bug is found.
//
// h [H] of each step is x/2 + (own neighbour's h + a far unit's h)/4, so a unit reads what another warp wrote.
// x [T, H] and output [T, H] are float32 in global memory. A thread owns a unit for all steps.
//   block_loop    Blocks of H = 128 threads, each with its own x and output. Shared memory: h in two buffers (one is
//                 written while the other is read, one block_sync() per step), then the ring of four steps of x, filled
//                 by copy_async three steps ahead.
//   cluster_loop  `ranks` blocks of 64 threads, H = 64 ranks. Shared memory: two mbarriers, h in two buffers. Two
//                 threads together send their two units to all ranks by store_async. The mbarrier of a buffer
//                 completes when all H have come. Thread 0 arms it again after it has waited.
//                 The loop needs no barrier: a thread that sends h of step t + 1 has received all of step t, so every
//                 thread has read the buffer that it writes. The end needs none: the last step sends nothing.
//   group_loop    `ranks` cooperative blocks of 64 threads, H = 64 ranks. h lies in two buffers in global memory. Plain
//                 stores write it, with group_sync() once per step. No shared memory.
#pragma once

#include "cuda/device/primitives.cuh"

namespace rnnfast::cuda::test {

enum class Bug {
  kNone,
  kNoBarrier,         // block_sync() removed
  kNoBarrierOnce,     // the same in one step only
  kSingleBuffer,      // h is read and written in one buffer
  kNoCopyWait,        // x is read before it has arrived
  kLateCopyWait,      // the wait is off by one group
  kRingCopyOutside,   // the ring is one step shorter than its use, copies first
  kRingReadOutside,   // the same, only for the plain load
  kRingWriteOutside,  // the same, for a plain store
  kSharedOutput,      // all blocks write the first one's output
  kMisaligned,        // 8 bytes are read from an address that is no multiple of 8
  kNoMbarrierWait,
  kNoClusterBarrier,  // others may send before the mbarriers are armed
  kNoRearm,           // the mbarrier is armed for its first use only
  kNoWarpSync,        // lanes send while others of their warp may still read
  kNoGroupSync,
  kEarlyGroupSync,  // waits for one block less
};

inline constexpr int kBlockUnits = 128, kStages = 4, kRankUnits = 64;
inline constexpr size_t kBlockShared = (2 * kBlockUnits + kStages * kBlockUnits) * sizeof(float);
inline constexpr size_t cluster_shared(int ranks) { return 16 + 2 * ranks * kRankUnits * sizeof(float); }

RNNFAST_DEVICE float mix(float x, float near, float far) { return 0.5f * x + 0.25f * (near + far); }

template <Bug bug>
__global__ void block_loop(const float* x, float* output, int steps) {
  constexpr int H = kBlockUnits;
  float* h = reinterpret_cast<float*>(shared_memory());
  float* ring = h + 2 * H;
  const int unit = static_cast<int>(threadIdx.x);
  x += static_cast<int>(blockIdx.x) * steps * H;
  if constexpr (bug != Bug::kSharedOutput) output += static_cast<int>(blockIdx.x) * steps * H;
  constexpr int kReadSlots = bug == Bug::kRingCopyOutside || bug == Bug::kRingReadOutside ? kStages + 1 : kStages;
  constexpr int kCopySlots = bug == Bug::kRingCopyOutside ? kStages + 1 : kStages;
  auto prefetch = [&](int t) {
    if (t < steps) copy_async<4>(ring + t % kCopySlots * H + unit, x + t * H + unit);
    copy_commit();
  };
  for (int t = 0; t < kStages - 1; ++t) prefetch(t);
  h[unit] = 0;
  block_sync();
  for (int t = 0; t < steps; ++t) {
    if constexpr (bug == Bug::kLateCopyWait) copy_wait<kStages - 1>();
    if constexpr (bug != Bug::kLateCopyWait && bug != Bug::kNoCopyWait) copy_wait<kStages - 2>();
    const float own_x = ring[t % kReadSlots * H + unit];
    prefetch(t + kStages - 1);
    const float* from = h + (bug == Bug::kSingleBuffer ? 0 : t % 2 * H);
    float* to = h + (bug == Bug::kSingleBuffer ? 0 : (t + 1) % 2 * H);
    const float value = mix(own_x, from[(unit + 1) % H], from[(unit + 65) % H]);
    to[unit] = value;
    if constexpr (bug == Bug::kRingWriteOutside) ring[(t % (kStages + 1)) * H + unit] = own_x;
    output[t * H + unit] = value;
    if constexpr (bug == Bug::kMisaligned) output[t * H + unit] += reinterpret_cast<const float2*>(h + unit % 2)->x * 0;
    if (bug != Bug::kNoBarrier && !(bug == Bug::kNoBarrierOnce && t == 2)) block_sync();
  }
}

template <Bug bug>
__global__ void cluster_loop(const float* x, float* output, int steps, int ranks) {
  if constexpr (RNNFAST_ARCH >= 900) {
    const int H = ranks * kRankUnits;
    Barrier* barriers = reinterpret_cast<Barrier*>(shared_memory());
    float* h = reinterpret_cast<float*>(shared_memory() + 16);
    const int thread = static_cast<int>(threadIdx.x);
    const int unit = static_cast<int>(cluster_rank()) * kRankUnits + thread;
    const unsigned bytes = static_cast<unsigned>(H * sizeof(float));
    for (int i = thread; i < H; i += kRankUnits) h[i] = 0;
    if (thread == 0) {
      for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_init_fence();
      for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, bytes);
    }
    if constexpr (bug == Bug::kNoClusterBarrier) {
      block_sync();
    } else {
      cluster_arrive();
      cluster_wait();
    }
    for (int t = 0; t < steps; ++t) {
      if (t > 0) {
        if constexpr (bug != Bug::kNoMbarrierWait) barrier_wait(barriers + t % 2, static_cast<unsigned>(t - 1) / 2 % 2);
        if (bug != Bug::kNoRearm && thread == 0) barrier_arrive_expect(barriers + t % 2, bytes);
      }
      const float* from = h + (bug == Bug::kSingleBuffer ? 0 : t % 2 * H);
      float* to = h + (bug == Bug::kSingleBuffer ? 0 : (t + 1) % 2 * H);
      const float value = mix(x[t * H + unit], from[(unit + 1) % H], from[(unit + 65) % H]);
      output[t * H + unit] = value;
      const float neighbour = shuffle_xor(value, 1);
      if constexpr (bug != Bug::kNoWarpSync) warp_sync();
      if (t + 1 < steps && thread % 2 == 0) {
        const uint2 pair = make_uint2(__float_as_uint(value), __float_as_uint(neighbour));
        for (int rank = 0; rank < ranks; ++rank) {
          store_async(map_to_rank(to + unit, rank), pair, map_to_rank(barriers + (t + 1) % 2, rank));
        }
      }
    }
  }
}

template <Bug bug>
__global__ void group_loop(const float* x, float* output, float* h, uint32_t* counter, int steps) {
  const int ranks = static_cast<int>(gridDim.x), H = ranks * kRankUnits;
  const int unit = static_cast<int>(blockIdx.x) * kRankUnits + static_cast<int>(threadIdx.x);
  for (int t = 0; t < steps; ++t) {
    const float* from = h + (bug == Bug::kSingleBuffer ? 0 : t % 2 * H);
    float* to = h + (bug == Bug::kSingleBuffer ? 0 : (t + 1) % 2 * H);
    const float value =
        mix(x[t * H + unit], load_uncached(from + (unit + 1) % H), load_uncached(from + (unit + 65) % H));
    to[unit] = value;
    output[t * H + unit] = value;
    if constexpr (bug == Bug::kEarlyGroupSync) {
      group_sync(counter, (t + 1) * ranks - 1);
    } else if constexpr (bug != Bug::kNoGroupSync) {
      group_sync(counter, (t + 1) * ranks);
    }
  }
}

}  // namespace rnnfast::cuda::test
