// One kernel that breaks one rule of the device. Each misuse must end the launch with an error that names it.
//
// Two blocks of 64 threads in a cluster, 256 bytes of shared memory each: an mbarrier at 0, data from 16 on.
#pragma once

#include "cuda/device/primitives.cuh"

namespace rnnfast::cuda::test {

enum class Misuse {
  kNone,
  kDivergentCollective,
  kLaneSkipsCollective,
  kThreadSkipsBarrier,
  kBarrierCountsDiffer,
  kClusterWaitWithoutArrive,
  kMbarrierBeforeInit,
  kMbarrierOverArrival,
  kMbarrierTooManyBytes,
  kMbarrierNeverArmed,
  kCopyOutside,
  kCopyUnaligned,
  kStoreAsyncOutside,
  kStoreAsyncToExited,
  kNoSuchRank,
  kWritePastEnd,
  kEndlessSpin,
  kEndlessLoads,
  kTrap,
  kDivergentClusterBarrier,
};

#if RNNFAST_ARCH >= 900  // clusters
__global__ void misuse_kernel(Misuse misuse, uint32_t* memory) {
  unsigned char* shared = shared_memory();
  Barrier* barrier = reinterpret_cast<Barrier*>(shared);
  const bool first = threadIdx.x == 0;
  switch (misuse) {
    case Misuse::kNone:
      return;
    case Misuse::kDivergentCollective:
      first ? transpose_8x8(1) : shuffle_xor(1u, 1);
      return;
    case Misuse::kLaneSkipsCollective:
      if (!first) shuffle_xor(1u, 1);
      return;
    case Misuse::kThreadSkipsBarrier:
      if (!first) block_sync();
      return;
    case Misuse::kBarrierCountsDiffer:
      block_sync(1, threadIdx.x < 32 ? 32 : 64);
      return;
    case Misuse::kClusterWaitWithoutArrive:
      cluster_wait();
      return;
    case Misuse::kMbarrierBeforeInit:
      barrier_wait(barrier, 0);
      return;
    case Misuse::kMbarrierOverArrival:
      if (!first) return;
      barrier_init(barrier, 1);
      barrier_arrive_expect(barrier, 16);
      barrier_arrive(barrier);
      return;
    case Misuse::kMbarrierTooManyBytes:
      if (!first) return;
      barrier_init(barrier, 1);
      store_async(map_to_rank(shared + 16, cluster_rank()), make_uint4(1, 2, 3, 4),
                  map_to_rank(barrier, cluster_rank()));
      barrier_arrive_expect(barrier, 8);
      barrier_wait(barrier, 0);
      return;
    case Misuse::kMbarrierNeverArmed:
      if (first) barrier_init(barrier, 1);
      block_sync();
      barrier_wait(barrier, 0);
      return;
    case Misuse::kCopyOutside:
      copy_async<16>(shared + 248, memory);
      return;
    case Misuse::kCopyUnaligned:
      copy_async<8>(shared + 20, memory);
      return;
    case Misuse::kStoreAsyncOutside:
      barrier_init(barrier, 1);
      store_async(map_to_rank(shared, 1) + 252, make_uint2(1, 2), map_to_rank(barrier, 1));
      return;
    case Misuse::kStoreAsyncToExited:
      if (cluster_rank() == 1) {
        if (first) barrier_init(barrier, 1);
        cluster_arrive();
        cluster_wait();
        return;
      }
      cluster_arrive();
      cluster_wait();
      if (first) store_async(map_to_rank(shared + 16, 1), make_uint2(1, 2), map_to_rank(barrier, 1));
      return;
    case Misuse::kNoSuchRank:
      map_to_rank(shared, 2);
      return;
    case Misuse::kWritePastEnd:
      if (first) *reinterpret_cast<float*>(shared + 256) = 1;
      return;
    case Misuse::kEndlessSpin: {
      Spin spin;
      while (load_acquire(memory) != 1) spin.again();
      return;
    }
    case Misuse::kEndlessLoads:
      while (load_relaxed(memory) != 1) {
      }
      return;
    case Misuse::kTrap:
      if (first) trap();
      return;
    case Misuse::kDivergentClusterBarrier:
      if (first) {
        warp_sync();
      } else {
        cluster_arrive();
      }
      return;
  }
}
#endif

}  // namespace rnnfast::cuda::test
