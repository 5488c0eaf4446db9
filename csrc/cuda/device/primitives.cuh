// Everything that kernels use of the device, under one name each. This is the only file with inline PTX.
//
// There are two implementations: PTX here, for nvcc, and the same names in csrc/emulator/primitives.h, with which the
// kernels' source runs on a CPU (RNNFAST_EMULATOR). Functions built from primitives alone stand at the end, for both.
//
// Shapes: mma takes a 16 x k tile of A (row-major), a k x 8 tile of B (column-major) and float32 sums of 16 x 8. They
// are spread over the 32 lanes as PTX has it. With g = lane / 4, t = lane % 4:
//   16-bit, k = 16   a[0..3]: rows g, g+8, g, g+8 at columns 2t..2t+1 (a[0], a[1]) and 2t+8..2t+9 (a[2], a[3])
//                    b0, b1: rows 2t..2t+1 and 2t+8..2t+9 of column g; two elements in one register, the first one low
//   tf32, k = 8      a[0..3]: rows g, g+8, g, g+8 at columns t (a[0], a[1]) and t+4 (a[2], a[3]); b0, b1: rows t, t+4
//   sums             rows g, g, g+8, g+8 at columns 2t, 2t+1, 2t, 2t+1
//
// A primitive that an architecture lacks fails the build there: an unresolved function's name says what is needed.
// Kernels skip it with `if constexpr (RNNFAST_ARCH >= 900)`.
//
// Limits: sm_75 and newer. Clusters, mbarriers and store_async need sm_90; bf16 and tf32 mma need sm_80.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(RNNFAST_EMULATOR)
#include "emulator/primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RNNFAST_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__)
#define RNNFAST_ARCH __CUDA_ARCH__
#else
#define RNNFAST_ARCH 900  // the host pass only reads the kernels
#endif

namespace rnnfast::cuda {

// Never defined: a call for an older architecture fails to build.
__device__ void this_primitive_needs_sm_80();
__device__ void this_primitive_needs_sm_90();

// --- Shared memory and the addresses of other blocks' shared memory

// All of a block's shared memory is dynamic and starts here, aligned to 128 bytes.
RNNFAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}

RNNFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// An address within the cluster. Adding bytes to it stays in the same block.
using RemoteAddress = uint32_t;

RNNFAST_DEVICE unsigned cluster_rank() {
  uint32_t rank = 0;
#if RNNFAST_ARCH >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#else
  this_primitive_needs_sm_90();
#endif
  return rank;
}

RNNFAST_DEVICE RemoteAddress map_to_rank(const void* shared, unsigned rank) {
  RemoteAddress address = 0;
#if RNNFAST_ARCH >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
#else
  this_primitive_needs_sm_90();
#endif
  return address;
}

// --- Barriers of a warp, of a block (id 0 to 15, for `threads` threads; block_sync() is id 0), of a cluster

RNNFAST_DEVICE void warp_sync() { __syncwarp(); }
RNNFAST_DEVICE void block_sync() { __syncthreads(); }
RNNFAST_DEVICE void block_sync(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
RNNFAST_DEVICE void block_arrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A full memory barrier of the GPU: for the beginning and the end of a kernel, never once per step.
RNNFAST_DEVICE void cluster_arrive() {
#if RNNFAST_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  this_primitive_needs_sm_90();
#endif
}
RNNFAST_DEVICE void cluster_wait() {
#if RNNFAST_ARCH >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  this_primitive_needs_sm_90();
#endif
}

// --- Warp: shuffles, votes, the transpose of an 8 x 8 tile of 16-bit elements (two per lane: row lane / 4)

template <class T>
RNNFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
RNNFAST_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
RNNFAST_DEVICE bool any_lane(bool condition) { return __any_sync(~0u, condition); }
RNNFAST_DEVICE bool all_lanes(bool condition) { return __all_sync(~0u, condition); }

RNNFAST_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// --- Conversions. pack() puts `low` into the low half. NaN becomes 0x7FFF, so no packed word is 0xFFFFFFFF.

RNNFAST_DEVICE float to_float(float value) { return value; }
RNNFAST_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
RNNFAST_DEVICE float to_float(__half value) { return __half2float(value); }

template <class Element>
RNNFAST_DEVICE Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

template <class Element>
RNNFAST_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
#if RNNFAST_ARCH >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    const __nv_bfloat162 value = __floats2bfloat162_rn(low, high);
    pair = reinterpret_cast<const uint32_t&>(value);
#endif
  } else {
    static_assert(std::is_same_v<Element, __half>, "pack: a 16-bit element type");
    const __half2 value = __floats2half2_rn(low, high);
    pair = reinterpret_cast<const uint32_t&>(value);
  }
  return pair;
}

template <class Element>
RNNFAST_DEVICE float unpack_low(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __uint_as_float(pair << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
}
template <class Element>
RNNFAST_DEVICE float unpack_high(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __uint_as_float(pair & 0xFFFF0000u);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
}

// The nearest number with 10 bits of mantissa, as a register of a tf32 mma.
RNNFAST_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits = 0;
#if RNNFAST_ARCH >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  this_primitive_needs_sm_80();
#endif
  return bits;
}

// --- sums += A B. Element: __nv_bfloat16 or __half (k = 16), or float (tf32, k = 8). mma_depth<Element> is this k.

template <class Element>
RNNFAST_DEVICE void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if RNNFAST_ARCH >= 800
#define RNNFAST_MMA(shape)                                                                         \
  asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                 \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    RNNFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<Element, __half>) {
    RNNFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<Element, float>, "mma: __nv_bfloat16, __half, or float for tf32");
    RNNFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef RNNFAST_MMA
#else
  if constexpr (std::is_same_v<Element, __half>) {  // two mma of half the k, with the same registers
#define RNNFAST_MMA(a0, a1, b)                                                                               \
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                           \
      : "r"(a0), "r"(a1), "r"(b))
    RNNFAST_MMA(a[0], a[1], b0);
    RNNFAST_MMA(a[2], a[3], b1);
#undef RNNFAST_MMA
  } else {
    this_primitive_needs_sm_80();
  }
#endif
}

// --- Copies from global to shared memory in the background, per thread. copy_commit() closes a group of copies.
// copy_wait<n>() waits until at most the n newest groups are under way. A copy that is not valid writes zeros and reads
// nothing. sm_75 copies at once.

template <int bytes>
RNNFAST_DEVICE void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "copy_async: 4, 8 or 16 bytes");
#if RNNFAST_ARCH >= 800
  const int read = valid ? bytes : 0;
  if constexpr (bytes == 16) {  // past the L1 cache: the data is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
                 "r"(read)
                 : "memory");
  }
#else
  using Chunk = std::conditional_t<bytes == 4, uint32_t, std::conditional_t<bytes == 8, uint2, uint4> >;
  *static_cast<Chunk*>(shared) = valid ? *static_cast<const Chunk*>(global) : Chunk{};
#endif
}

RNNFAST_DEVICE void copy_commit() {
#if RNNFAST_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
RNNFAST_DEVICE void copy_wait() {
#if RNNFAST_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// --- mbarriers (8 bytes of shared memory). A phase completes when all arrivals and all expected bytes have come.

using Barrier = uint64_t;

RNNFAST_DEVICE void barrier_init(Barrier* barrier, unsigned arrivals) {
#if RNNFAST_ARCH >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  this_primitive_needs_sm_90();
#endif
}

// After the barrier_init()s and before the cluster barrier that lets other blocks use them.
RNNFAST_DEVICE void barrier_init_fence() {
#if RNNFAST_ARCH >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  this_primitive_needs_sm_90();
#endif
}

RNNFAST_DEVICE void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
#if RNNFAST_ARCH >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  this_primitive_needs_sm_90();
#endif
}

RNNFAST_DEVICE void barrier_arrive(Barrier* barrier) {
#if RNNFAST_ARCH >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  this_primitive_needs_sm_90();
#endif
}

// Whether the phase of this parity is complete. If not, the hardware first waits for a time of its choice. The scope is
// the block, because the data lies in its own memory. Cluster scope would invalidate the L1 cache at every step.
RNNFAST_DEVICE bool barrier_try_wait(Barrier* barrier, unsigned parity) {
  uint32_t complete = 0;
#if RNNFAST_ARCH >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(complete)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
#else
  this_primitive_needs_sm_90();
#endif
  return complete;
}

// Writes `value` (8 or 16 bytes) into a block of the cluster and counts the bytes off that block's mbarrier. A thread
// that has waited for the mbarrier sees the data: no fence is needed.
template <class T>
RNNFAST_DEVICE void store_async(RemoteAddress address, T value, RemoteAddress barrier) {
  static_assert(std::is_same_v<T, uint2> || std::is_same_v<T, uint4>, "store_async: uint2 or uint4");
#if RNNFAST_ARCH >= 900
  if constexpr (std::is_same_v<T, uint2>) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "r"(value.x), "r"(value.y), "r"(barrier)
                 : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
        : "memory");
  }
#else
  this_primitive_needs_sm_90();
#endif
}

// --- Global memory that other blocks write while this one runs. 16 bytes may be torn into words, but no word is torn.

RNNFAST_DEVICE uint32_t load_relaxed(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
RNNFAST_DEVICE uint4 load_relaxed(const uint4* address) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
RNNFAST_DEVICE void store_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
RNNFAST_DEVICE void store_relaxed(uint4* address, uint4 value) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
}
RNNFAST_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
RNNFAST_DEVICE void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
RNNFAST_DEVICE void add_release(uint32_t* address, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// A load of 4, 8 or 16 bytes that skips the L1 cache, because other blocks' stores do not reach it. The compiler
// neither moves nor merges it.
template <class T>
RNNFAST_DEVICE T load_uncached(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "load_uncached: 4, 8 or 16 bytes");
  uint4 value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value.x) : "l"(address) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address) : "memory");
  } else {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
  }
  return reinterpret_cast<const T&>(value);
}

// --- Approximations in hardware, with the largest error that PTX documents. cell.h needs host versions to compile;
// nothing runs them.

// 2^x, relative error 2^-22; results below the smallest normal number are 0.
__host__ __device__ __forceinline__ float exp2_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x, relative error 2^-23.
__host__ __device__ __forceinline__ float reciprocal_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// tanh(x), relative error 2^-11: for results that are rounded to bfloat16.
__host__ __device__ __forceinline__ float tanh_approximate(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return tanhf(x);
#endif
}

// --- The same value, kept in a register. The compiler would compute a cheap value again at every use in a loop.

RNNFAST_DEVICE int keep(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// --- Bounded waiting

// Ends the kernel with an error such as cudaErrorLaunchFailure. Every later CUDA call of the process returns it. torch
// raises it where it next waits for the GPU, so nobody reads the kernel's results.
[[noreturn]] RNNFAST_DEVICE void trap() {
  __trap();
  __builtin_unreachable();
}

// A polling loop is `Spin spin; while (!ready()) spin.again();`. A kernel that can report instead of trapping writes
// `while (!ready()) if (spin.exhausted()) ...`.
class Spin {
 public:
  // True when more waiting is hopeless. Looks at the clock once in 256 rounds.
  RNNFAST_DEVICE bool exhausted() {
    if (++rounds_ % 256) return false;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start_ == 0) start_ = now;
    return now - start_ > kNanoseconds;
  }
  RNNFAST_DEVICE void again() {
    if (exhausted()) trap();
  }

 private:
  // Time slices of a shared device are milliseconds. A wait of ten seconds means that the awaited block does not run.
  static constexpr uint64_t kNanoseconds = 10'000'000'000;
  uint64_t start_ = 0;
  uint32_t rounds_ = 0;
};

RNNFAST_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
  Spin spin;
  while (!barrier_try_wait(barrier, parity)) spin.again();
}

}  // namespace rnnfast::cuda

#include "cuda/device/launch.cuh"

#endif

namespace rnnfast::cuda {

// --- Built from the primitives, for both implementations

template <class Element>
inline constexpr int mma_depth = std::is_same_v<Element, float> ? 8 : 16;

// A meeting of one-dimensional blocks that share a counter. Each adds 1 and waits until the counter is `target`: n k
// for the k-th meeting of n blocks. Afterwards all blocks see each other's earlier writes, through load_uncached or a
// first plain load.
RNNFAST_DEVICE void group_sync(uint32_t* counter, uint32_t target) {
  block_sync();
  if (threadIdx.x == 0) {
    add_release(counter, 1);
    Spin spin;
    while (load_acquire(counter) < target) spin.again();
  }
  block_sync();
}

}  // namespace rnnfast::cuda
