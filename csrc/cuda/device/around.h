// The small kernels around the recurrence, beside the matrix products of torch and the steps of the cells. No torch.
#pragma once

#include "cuda/layer.h"

#if defined(RNNFAST_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rnnfast::cuda {

// sums [D, G*H] = bias_ih + bias_hh. GRU's n plane is without b_hn, because r multiplies b_hn.
struct BiasSum {
  Arithmetic arithmetic;  // gives the element type
  Cell cell;
  int hidden_size, directions;
  const void* bias_ih[kMaxDirections];  // contiguous
  const void* bias_hh[kMaxDirections];
  void* sums;
};
cudaError_t sum_biases(const BiasSum& call, cudaStream_t stream);

// clamped: int32 [B], from int32 or int64 (wide) lengths. Values out of range become 0 or T. So no kernel can leave its
// tensors, and the host need not wait to look at the lengths.
cudaError_t clamp_lengths(const void* lengths, bool wide, int32_t* clamped, int batch, int steps, cudaStream_t stream);

// offsets int64 [T] and lengths int32 [B] of a packed batch. batch_sizes [T] is host memory. It travels as arguments of
// kernels, so nothing waits, and a CUDA graph can capture it.
cudaError_t write_schedule(const int64_t* batch_sizes, int64_t steps, int64_t* offsets, int32_t* lengths,
                           cudaStream_t stream);

// previous [D, N, P]: h before each row's step, from output and hx (null: zeros). Rows of padding get zeros.
cudaError_t gather_previous(Arithmetic arithmetic, const Shape& shape, const void* output, const void* hx,
                            void* previous, cudaStream_t stream);

// unprojected [D, N, H] = o tanh(c), the operand of the product with weight_hr.
cudaError_t cell_outputs(Arithmetic arithmetic, const Shape& shape, const void* gates, const float* c,
                         void* unprojected, cudaStream_t stream);

}  // namespace rnnfast::cuda
