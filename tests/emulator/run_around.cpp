// C entry points of the kernels around the recurrence (csrc/cuda/device/around.h), for tests/test_cuda_around.py.
#include <cstdint>

#include "emulator/device.h"
// After emulator/device.h, which defines CUDA's names.
#include "cuda/device/around.h"

extern "C" {

int rnnfast_clamp_lengths(const void* lengths, int wide, int32_t* clamped, int batch, int steps) {
  return rnnfast::cuda::clamp_lengths(lengths, wide, clamped, batch, steps, nullptr);
}

int rnnfast_write_schedule(const int64_t* batch_sizes, int64_t steps, int64_t* offsets, int32_t* lengths) {
  return rnnfast::cuda::write_schedule(batch_sizes, steps, offsets, lengths, nullptr);
}
}
