// The small kernels around the recurrence: what is neither a matrix product of torch nor a step of a cell. No torch.
#pragma once

#include "cuda/layer.h"

#if defined(RNNFAST_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rnnfast::cuda {

// sums [D, G*H] = bias_ih + bias_hh, GRU's n plane without b_hn (r multiplies that one).
struct BiasSum {
  Arithmetic arithmetic;  // gives the element type
  Cell cell;
  int hidden_size, directions;
  const void* bias_ih[kMaxDirections];  // contiguous
  const void* bias_hh[kMaxDirections];
  void* sums;
};
cudaError_t sum_biases(const BiasSum& call, cudaStream_t stream);

// lengths int32 [B] of int32 or int64 ones anywhere in between; out-of-range values become 0 or T, so that no kernel
// can leave its tensors and the host need not wait to look at them.
cudaError_t clamp_lengths(const void* lengths, bool wide, int32_t* clamped, int batch, int steps, cudaStream_t stream);

// offsets int64 [T] and lengths int32 [B] of a packed batch. batch_sizes [T] is host memory; it travels as arguments of
// kernels, so nothing waits and a CUDA graph can capture it.
cudaError_t write_schedule(const int64_t* batch_sizes, int64_t steps, int64_t* offsets, int32_t* lengths,
                           cudaStream_t stream);

// previous [D, N, P]: h before each row's step, from output and hx (null: zeros); zeros where padded rows are idle.
cudaError_t gather_previous(Arithmetic arithmetic, const Shape& shape, const void* output, const void* hx,
                            void* previous, cudaStream_t stream);

// cells [D, N, H] = o tanh(c), what weight_hr multiplied.
cudaError_t cell_outputs(Arithmetic arithmetic, const Shape& shape, const void* gates, const float* c, void* cells,
                         cudaStream_t stream);

}  // namespace rnnfast::cuda
