// The primitives of csrc/cuda/device/primitives.cuh for the emulator: the same names and meaning, described there.
//
// Approximations err as far as PTX allows, by a function of the argument's bits. So parity here does not depend on the
// host's better mathematics. Sums of an mma are exact within one instruction and then rounded towards zero. Tensor
// cores are reported to work like that (a model, not a specification).
#pragma once
#include <type_traits>

#include "emulator/device.h"
#include "emulator/runtime.h"
#include "emulator/warp.h"

#define RNNFAST_DEVICE inline
#define RNNFAST_ARCH 900

namespace rnnfast::cuda {

using emulator::cluster_arrive;
using emulator::cluster_rank;
using emulator::cluster_wait;
using emulator::copy_commit;
using emulator::shared_memory;

// --- Shared memory and the addresses of other blocks' shared memory

using RemoteAddress = unsigned char*;

inline RemoteAddress map_to_rank(const void* shared, unsigned rank) {
  return static_cast<RemoteAddress>(emulator::map_to_rank(shared, rank));
}

// --- Barriers

inline void warp_sync() { emulator::warp_barrier(); }
inline void block_sync() { emulator::block_barrier(0, blockDim.x * blockDim.y * blockDim.z, true); }
inline void block_sync(unsigned id, unsigned threads) { emulator::block_barrier(id, threads, true); }
inline void block_arrive(unsigned id, unsigned threads) { emulator::block_barrier(id, threads, false); }

// --- Warp

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shuffle_xor: 4 bytes");
  emulator::ShuffleArgument argument{__builtin_bit_cast(uint32_t, value), 0, mask};
  emulator::collective(emulator::compute_shuffle_xor, &argument, "shuffle_xor");
  return __builtin_bit_cast(T, argument.result);
}

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffle: 4 bytes");
  emulator::ShuffleArgument argument{__builtin_bit_cast(uint32_t, value), 0, lane};
  emulator::collective(emulator::compute_shuffle, &argument, "shuffle");
  return __builtin_bit_cast(T, argument.result);
}

inline bool any_lane(bool condition) {
  emulator::ShuffleArgument argument{condition, 0, 0};
  emulator::collective(emulator::compute_any, &argument, "any_lane");
  return argument.result;
}
inline bool all_lanes(bool condition) {
  emulator::ShuffleArgument argument{condition, 0, 0};
  emulator::collective(emulator::compute_all, &argument, "all_lanes");
  return argument.result;
}

inline uint32_t transpose_8x8(uint32_t pair) {
  emulator::ShuffleArgument argument{pair, 0, 0};
  emulator::collective(emulator::compute_transpose, &argument, "transpose_8x8");
  return argument.result;
}

// --- Conversions

inline float to_float(float value) { return value; }
inline float to_float(__nv_bfloat16 value) { return emulator::from_bf16(value.bits); }
inline float to_float(__half value) { return emulator::from_half(value.bits); }

template <class Element>
Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return {emulator::to_bf16(value)};
  } else if constexpr (std::is_same_v<Element, __half>) {
    return {emulator::to_half(value)};
  } else {
    return value;
  }
}

template <class Element>
uint32_t pack(float low, float high) {
  return from_float<Element>(low).bits | uint32_t{from_float<Element>(high).bits} << 16;
}
template <class Element>
float unpack_low(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair)});
}
template <class Element>
float unpack_high(uint32_t pair) {
  return to_float(Element{static_cast<uint16_t>(pair >> 16)});
}

// Rounds half away from zero, like cvt.rna.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bits;
  return (bits + 0x1000u) & 0xFFFFE000u;
}

// --- Tensor cores

template <class Element>
void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::MmaArgument argument{sums, a, {b0, b1}};
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    emulator::collective(emulator::compute_mma_bf16, &argument, "mma<__nv_bfloat16>");
  } else if constexpr (std::is_same_v<Element, __half>) {
    emulator::collective(emulator::compute_mma_half, &argument, "mma<__half>");
  } else {
    static_assert(std::is_same_v<Element, float>, "mma: __nv_bfloat16, __half, or float for tf32");
    emulator::collective(emulator::compute_mma_tf32, &argument, "mma<float>");
  }
  emulator::progress();
}

// --- Asynchronous copies, mbarriers, stores to other blocks

template <int bytes>
void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "copy_async: 4, 8 or 16 bytes");
  emulator::copy_async(shared, global, bytes, valid);
}

template <int pending>
void copy_wait() {
  emulator::copy_wait(pending);
}

using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, unsigned arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(Barrier* barrier, unsigned bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(Barrier* barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_wait(Barrier* barrier, unsigned parity) { emulator::barrier_wait(barrier, parity); }
inline bool barrier_try_wait(Barrier* barrier, unsigned parity) { return emulator::barrier_try_wait(barrier, parity); }

template <class T>
void store_async(RemoteAddress address, T value, RemoteAddress barrier) {
  static_assert(std::is_same_v<T, uint2> || std::is_same_v<T, uint4>, "store_async: uint2 or uint4");
  emulator::store_async(address, &value, sizeof(T), barrier);
}

// --- Global memory that other blocks write while this one runs: one word at a time, in any order, others run in
// between

inline uint32_t load_relaxed(const uint32_t* address) {
  emulator::observe();
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline uint4 load_relaxed(const uint4* address) {
  uint32_t words[4];
  const unsigned first = emulator::observe();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned word = (first + i) % 4;
    words[word] = __atomic_load_n(reinterpret_cast<const uint32_t*>(address) + word, __ATOMIC_RELAXED);
    if (i == 1) emulator::observe();
  }
  return {words[0], words[1], words[2], words[3]};
}
inline void store_relaxed(uint32_t* address, uint32_t value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
  emulator::progress();
}
inline void store_relaxed(uint4* address, uint4 value) {
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
  const unsigned first = emulator::observe();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned word = (first + i) % 4;
    store_relaxed(reinterpret_cast<uint32_t*>(address) + word, words[word]);
    if (i == 1) emulator::observe();
  }
}
inline uint32_t load_acquire(const uint32_t* address) {
  emulator::observe();
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
inline void store_release(uint32_t* address, uint32_t value) {
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
  emulator::progress();
}
inline void add_release(uint32_t* address, uint32_t value) {
  __atomic_fetch_add(address, value, __ATOMIC_RELEASE);
  emulator::progress();
}

template <class T>
T load_uncached(const T* address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "load_uncached: 4, 8 or 16 bytes");
  return *address;
}

// --- Approximations

inline float exp2_approximate(float x) { return emulator::perturb(std::exp2(static_cast<double>(x)), x, 22); }
inline float reciprocal_approximate(float x) { return emulator::perturb(1.0 / x, x, 23); }
inline float tanh_approximate(float x) {
  return std::clamp(emulator::perturb(std::tanh(static_cast<double>(x)), x, 11), -1.0f, 1.0f);
}

// --- Bounded waiting: the emulator knows when nothing happens any more.

[[noreturn]] inline void trap() { emulator::fail("trap()"); }

inline int keep(int value) { return value; }

class Spin {
 public:
  bool exhausted() { return !emulator::poll(); }
  void again() {
    if (exhausted()) emulator::fail("spin budget exceeded: what this poll waits for never happens");
  }
};

// --- Launching

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, bool cooperative,
                   size_t shared_bytes, cudaStream_t, std::type_identity_t<Parameters>... args) {
  return emulator::run({grid, block, cluster, cooperative, shared_bytes}, [=] { kernel(args...); });
}

template <class... Parameters>
cudaError_t resident_blocks(void (*)(Parameters...), dim3, unsigned cluster, size_t, unsigned* blocks) {
  *blocks = emulator::resident_blocks() / cluster * cluster;
  return cudaSuccess;
}

}  // namespace rnnfast::cuda
