// Entry points for test_emulator.py (ctypes): they launch the kernels of primitive_kernels.cuh. They return 0, or 1
// with error_text().
#include <exception>
#include <string>

#include "misuse_kernels.cuh"
#include "primitive_kernels.cuh"

namespace {

using namespace rnnfast::cuda;
using namespace rnnfast::cuda::test;

thread_local std::string text;

template <class Body>
int guarded(Body body) {
  text.clear();
  try {
    const cudaError_t error = body();
    if (error != cudaSuccess) text = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    text = error.what();
  }
  return !text.empty();
}

template <int bytes>
cudaError_t launch_copy(int waits, const unsigned char* source, unsigned char* out) {
  auto* kernel = waits == 0 ? copy_kernel<bytes, 0> : waits == 1 ? copy_kernel<bytes, 1> : copy_kernel<bytes, 2>;
  return launch(kernel, dim3(1), dim3(32), 1, false, 1024, nullptr, source, out);
}

}  // namespace

extern "C" {

const char* error_text() { return text.c_str(); }

int configure(uint64_t seed, const char* schedule, unsigned resident) {
  return guarded([&] {
    rnnfast::emulator::Options options;
    options.seed = seed;
    options.schedule = rnnfast::emulator::schedule_named(schedule);
    options.resident_blocks = resident;
    rnnfast::emulator::configure(options);
    return cudaSuccess;
  });
}

int check_mma(int element, const float* a, const float* b, float* sums) {
  return guarded([&] {
    auto* kernel = element == 0 ? mma_kernel<__nv_bfloat16> : element == 1 ? mma_kernel<__half> : mma_kernel<float>;
    return launch(kernel, dim3(1), dim3(32), 1, false, 0, nullptr, a, b, sums);
  });
}

int check_transpose(const uint32_t* tile, uint32_t* transposed) {
  return guarded([&] { return launch(transpose_kernel, dim3(1), dim3(32), 1, false, 0, nullptr, tile, transposed); });
}

int check_warp(const float* value, float* out) {
  return guarded([&] { return launch(warp_kernel, dim3(1), dim3(32), 1, false, 0, nullptr, value, out); });
}

int check_convert(const float* value, int count, float* out, uint32_t* bits) {
  return guarded(
      [&] { return launch(convert_kernel, dim3(1), dim3(8), 1, false, 0, nullptr, value, count, out, bits); });
}

int check_math(const float* x, int count, float* out) {
  return guarded([&] { return launch(math_kernel, dim3(1), dim3(8), 1, false, 0, nullptr, x, count, out); });
}

int check_copy(int bytes, int waits, const unsigned char* source, unsigned char* out) {
  return guarded([&] {
    return bytes == 4   ? launch_copy<4>(waits, source, out)
           : bytes == 8 ? launch_copy<8>(waits, source, out)
                        : launch_copy<16>(waits, source, out);
  });
}

int check_exchange(int ranks, int rounds, uint32_t* out) {
  return guarded([&] {
    const size_t shared_bytes = 16 + 2 * size_t(ranks) * 32 * 24;
    return launch(exchange_kernel, dim3(ranks), dim3(32), ranks, false, shared_bytes, nullptr, ranks, rounds, out);
  });
}

int check_named_barrier(int warps, int* out) {
  return guarded([&] { return launch(named_barrier_kernel, dim3(1), dim3(32 * warps), 1, false, 4, nullptr, out); });
}

int check_group(int blocks, int meetings, int cooperative, uint32_t* counter, uint32_t* values, uint32_t* out) {
  return guarded([&] {
    return launch(group_kernel, dim3(blocks), dim3(32), 1, cooperative, 0, nullptr, meetings, counter, values, out);
  });
}

int check_relay(int blocks, uint32_t* flags, uint32_t* count) {
  return guarded([&] { return launch(relay_kernel, dim3(blocks), dim3(32), 1, true, 0, nullptr, flags, count); });
}

int check_poll(int blocks, int cooperative, uint4* mail, int* gave_up) {
  return guarded(
      [&] { return launch(poll_kernel, dim3(blocks), dim3(32), 1, cooperative, 0, nullptr, mail, gave_up); });
}

int check_order(int* first) {
  return guarded([&] { return launch(order_kernel, dim3(2), dim3(32), 2, false, 64, nullptr, first); });
}

int check_misuse(int kind) {
  return guarded([&] {
    static uint32_t memory[64];
    return launch(misuse_kernel, dim3(2), dim3(64), 2, false, 256, nullptr, static_cast<Misuse>(kind), memory);
  });
}

int check_launch(unsigned grid, unsigned block, unsigned cluster, int cooperative, size_t shared_bytes) {
  return guarded([&] {
    return launch(misuse_kernel, dim3(grid), dim3(block), cluster, cooperative, shared_bytes, nullptr, Misuse::kNone,
                  nullptr);
  });
}

unsigned check_resident(unsigned cluster) {
  unsigned blocks = 0;
  resident_blocks(misuse_kernel, dim3(32), cluster, 0, &blocks);
  return blocks;
}
}
