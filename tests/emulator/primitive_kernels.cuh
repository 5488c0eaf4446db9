// One small kernel per primitive. test_emulator.py runs them and compares; nvcc compiles them as well.
//
// Tiles are plain row-major matrices in global memory. Each kernel spreads them over the lanes as primitives.cuh says.
#pragma once

#include "cuda/device/math.cuh"

namespace rnnfast::cuda::test {

// sums [16, 8] += a [16, k] b [k, 8]; one warp.
template <class Element>
__global__ void mma_kernel(const float* a, const float* b, float* sums) {
  if constexpr (RNNFAST_ARCH >= 800 || std::is_same_v<Element, __half>) {
    constexpr int depth = mma_depth<Element>;
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    auto pair = [&](const float* first, int stride) -> uint32_t {
      if constexpr (std::is_same_v<Element, float>) {
        return to_tf32(*first);
      } else {
        return pack<Element>(first[0], first[stride]);
      }
    };
    const int k = std::is_same_v<Element, float> ? t : 2 * t;
    const uint32_t tile_a[4] = {pair(a + g * depth + k, 1), pair(a + (g + 8) * depth + k, 1),
                                pair(a + g * depth + k + depth / 2, 1), pair(a + (g + 8) * depth + k + depth / 2, 1)};
    float tile_sums[4];
    for (int i = 0; i < 4; ++i) tile_sums[i] = sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma<Element>(tile_sums, tile_a, pair(b + k * 8 + g, 8), pair(b + (k + depth / 2) * 8 + g, 8));
    for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = tile_sums[i];
  }
}

// tile [8, 8] of 16-bit words -> its transpose; one warp.
__global__ void transpose_kernel(const uint32_t* tile, uint32_t* transposed) {
  transposed[threadIdx.x] = transpose_8x8(tile[threadIdx.x]);
}

// out [5, 32]: shuffle_xor by 5, shuffle from the next lane, any and all of (value > 0), of (value > -1000); one warp.
__global__ void warp_kernel(const float* value, float* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const float own = value[lane];
  out[lane] = shuffle_xor(own, 5);
  out[32 + lane] = shuffle(own, (lane + 1) % 32);
  out[64 + lane] = any_lane(own > 0);
  out[96 + lane] = all_lanes(own > 0);
  out[128 + lane] = all_lanes(own > -1000);
}

// Values there and back through bf16, then half: from the low and the (negated) high half of a word, and one by one.
// out [6, count], bits [2, count].
__global__ void convert_kernel(const float* value, int count, float* out, uint32_t* bits) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const uint32_t bf16 = pack<__nv_bfloat16>(value[i], -value[i]), half = pack<__half>(value[i], -value[i]);
    out[i] = unpack_low<__nv_bfloat16>(bf16);
    out[count + i] = unpack_high<__nv_bfloat16>(bf16);
    out[2 * count + i] = to_float(from_float<__nv_bfloat16>(value[i]));
    out[3 * count + i] = unpack_low<__half>(half);
    out[4 * count + i] = unpack_high<__half>(half);
    out[5 * count + i] = to_float(from_float<__half>(value[i]));
    bits[i] = bf16;
    bits[count + i] = half;
  }
}

// out [6, count]: exact sigmoid, tanh; approximate sigmoid, tanh; exact relu, relu_slope.
__global__ void math_kernel(const float* x, int count, float* out) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = ExactMath::sigmoid(x[i]);
    out[count + i] = ExactMath::tanh(x[i]);
    out[2 * count + i] = ApproximateMath::sigmoid(x[i]);
    out[3 * count + i] = ApproximateMath::tanh(x[i]);
    out[4 * count + i] = ExactMath::relu(x[i]);
    out[5 * count + i] = ExactMath::relu_slope(x[i]);
  }
}

// Thread i copies `bytes` at source + 16 i in two groups of a copy each. waits: 0 for neither, 1 for the older one, 2
// for both. out [2, 32, 16 bytes]: what the thread then sees. Odd lanes' second copies are not valid.
template <int bytes, int waits>
__global__ void copy_kernel(const unsigned char* source, unsigned char* out) {
  unsigned char* own = shared_memory() + 16 * threadIdx.x;
  copy_async<bytes>(own, source + 16 * threadIdx.x);
  copy_commit();
  copy_async<bytes>(own + 512, source + 512 + 16 * threadIdx.x, threadIdx.x % 2 == 0);
  copy_commit();
  if constexpr (waits == 1) copy_wait<1>();
  if constexpr (waits == 2) copy_wait<0>();
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < bytes; ++i) out[512 * half + 16 * threadIdx.x + i] = own[512 * half + i];
  }
}

// Rank r sends 16 bytes {r, lane, round, 7} and 8 bytes to every rank, `rounds` times over one mbarrier per round
// parity; out [ranks, rounds, ranks, 32]: the sum of what arrived. A cluster of up to 8 blocks of 32 threads.
__global__ void exchange_kernel(int ranks, int rounds, uint32_t* out) {
  if constexpr (RNNFAST_ARCH >= 900) {
    unsigned char* memory = shared_memory();
    Barrier* barriers = reinterpret_cast<Barrier*>(memory);
    const unsigned rank = cluster_rank(), lane = threadIdx.x;
    const unsigned buffer_bytes = static_cast<unsigned>(ranks) * 32 * 24;
    if (lane == 0) {
      barrier_init(barriers, 1);
      barrier_init(barriers + 1, 1);
      barrier_init_fence();
      barrier_arrive_expect(barriers, buffer_bytes);
      barrier_arrive_expect(barriers + 1, buffer_bytes);
    }
    cluster_arrive();
    cluster_wait();
    for (int round = 0; round < rounds; ++round) {
      const unsigned slot = static_cast<unsigned>(round) % 2;
      unsigned char* buffer = memory + 16 + slot * buffer_bytes;
      unsigned char* wide = buffer + (rank * 32 + lane) * 16;
      unsigned char* narrow = buffer + static_cast<unsigned>(ranks) * 512 + (rank * 32 + lane) * 8;
      for (int to = 0; to < ranks; ++to) {
        const RemoteAddress barrier = map_to_rank(barriers + slot, to);
        store_async(map_to_rank(wide, to), make_uint4(rank, lane, round, 7), barrier);
        store_async(map_to_rank(narrow, to), make_uint2(100, 1000), barrier);
      }
      barrier_wait(barriers + slot, static_cast<unsigned>(round) / 2 % 2);
      warp_sync();  // all lanes have seen this phase before it is armed again
      for (int from = 0; from < ranks; ++from) {
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + (from * 32 + lane) * 16);
        const uint2 w = *reinterpret_cast<const uint2*>(buffer + ranks * 512 + (from * 32 + lane) * 8);
        out[((rank * rounds + round) * ranks + from) * 32 + lane] = v.x + v.y + v.z + v.w + w.x + w.y;
      }
      if (lane == 0) barrier_arrive_expect(barriers + slot, buffer_bytes);
      cluster_arrive();  // nobody sends into a buffer that is still being read
      cluster_wait();
    }
  }
}

// Block 0 sends to two mbarriers of block 1, one after the other: *first is the one that completed first.
__global__ void order_kernel(int* first) {
  if constexpr (RNNFAST_ARCH >= 900) {
    Barrier* barriers = reinterpret_cast<Barrier*>(shared_memory());
    const bool receives = cluster_rank() == 1 && threadIdx.x == 0;
    if (receives) {
      for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_init_fence();
      for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, 8);
    }
    cluster_arrive();
    cluster_wait();
    if (cluster_rank() == 0 && threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        store_async(map_to_rank(shared_memory() + 16 + 8 * i, 1), make_uint2(1, 2), map_to_rank(barriers + i, 1));
      }
    }
    if (receives) {
      Spin spin;
      for (*first = -1; *first < 0; spin.again()) {
        for (int i = 0; i < 2; ++i) {
          if (*first < 0 && barrier_try_wait(barriers + i, 0)) *first = i;
        }
      }
      barrier_wait(barriers + 1 - *first, 0);
    }
  }
}

// Warps pass a token through named barriers 1.. and out[warp] is its value; then block_arrive / block_sync as a pair.
__global__ void named_barrier_kernel(int* out) {
  int* token = reinterpret_cast<int*>(shared_memory());
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (threadIdx.x == 0) *token = 0;
  block_sync();
  if (warp > 0) block_sync(warp, 64);
  if (threadIdx.x % 32 == 0) out[warp] = ++*token;
  warp_sync();
  if (warp + 1 < warps) block_arrive(warp + 1, 64);
}

// Every block adds its index to sums [meetings] and sees all the others' after group_sync(); out [blocks, meetings].
__global__ void group_kernel(int meetings, uint32_t* counter, uint32_t* values, uint32_t* out) {
  for (int meeting = 0; meeting < meetings; ++meeting) {
    uint32_t* row = values + meeting * static_cast<int>(gridDim.x);
    if (threadIdx.x == 0) row[blockIdx.x] = blockIdx.x + 10 * meeting;
    group_sync(counter, (meeting + 1) * gridDim.x);
    if (threadIdx.x == 0) {
      uint32_t sum = 0;
      for (unsigned i = 0; i < gridDim.x; ++i) sum += load_uncached(row + i);
      out[blockIdx.x * meetings + meeting] = sum;
    }
  }
}

// Blocks take turns: flags[0] says whose turn it is, *count is a plain number that each adds 1 to, flags[1] the same as
// a relaxed word.
__global__ void relay_kernel(uint32_t* flags, uint32_t* count) {
  if (threadIdx.x != 0) return;
  Spin spin;
  while (load_acquire(flags) != blockIdx.x) spin.again();
  *count += 1;
  store_relaxed(flags + 1, load_relaxed(flags + 1) + 1);
  store_release(flags, blockIdx.x + 1);
}

// The data itself is polled: block b sends 16 bytes to block b + 1, which adds 1; out [4] is the last one's.
__global__ void poll_kernel(uint4* mail, int* gave_up) {
  if (threadIdx.x != 0) return;
  uint4 value = make_uint4(0, 1, 2, 3);
  if (blockIdx.x > 0) {
    Spin spin;
    for (;;) {
      value = load_relaxed(mail + blockIdx.x - 1);
      if (value.x != ~0u && value.y != ~0u && value.z != ~0u && value.w != ~0u) break;
      if (spin.exhausted()) {
        *gave_up = 1;
        return;
      }
    }
    value = make_uint4(value.x + 1, value.y + 1, value.z + 1, value.w + 1);
  }
  store_relaxed(mail + blockIdx.x, value);
}

}  // namespace rnnfast::cuda::test
