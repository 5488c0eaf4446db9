// Tier group: CTAs that run at the same time share the recurrence of a batch tile (8 sequences) in one direction. Each
// has some of the units. They exchange h (backward: gate gradients) through global memory. Host side, without torch.
#pragma once

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

// What a launch of a shape takes.
struct GroupResources {
  int threads;             // of a CTA
  int shared_bytes;        // of a CTA
  int members;             // CTAs of a group; all must fit the device at once
  int64_t exchange_bytes;  // of the workspace, all groups together
};

// The largest H. Weights of 16 units (RNN 32) take up to 128 registers in each of 8 warps, and as much shared memory.
constexpr int group_largest_hidden(Arithmetic arithmetic) {
  return is_16_bit(arithmetic) ? 2048 : arithmetic == Arithmetic::kTf32 ? 1024 : 512;
}

// The largest P of a projection, whose weights share these registers and this memory. Backward of the largest H and P
// takes 220 KiB (exact 226) of the 227 KiB that a CTA of sm_90 can have.
constexpr int group_largest_projection(Arithmetic arithmetic) { return group_largest_hidden(arithmetic) / 2; }

// Why no kernel serves a shape. Null: one does.
inline const char* group_refuses(Arithmetic arithmetic, const Shape& shape) {
  if (shape.hidden_size > group_largest_hidden(arithmetic)) return "weight_hh exceeds what a group can hold";
  if (!is_projected(shape)) return nullptr;
  if (shape.cell != Cell::kLstm || shape.output_size <= 0)
    return "only an LSTM has a projection, of at least one output";
  return shape.output_size > group_largest_projection(arithmetic) ? "weight_hr exceeds what a group can hold" : nullptr;
}

// exchange: exchange_bytes, aligned to 16, with any content. A launch runs as many groups at once as the current device
// holds, then the others. An error means that nothing was launched: cudaErrorInvalidConfiguration where the shape is
// refused, cudaErrorCooperativeLaunchTooLarge where not even one group fits the device.
template <Arithmetic arithmetic>
GroupResources group_forward_resources(const Shape& shape);
template <Arithmetic arithmetic>
GroupResources group_backward_resources(const Shape& shape);
// Whether the current device can run a group of this shape's kernel: its CTAs wait for each other.
template <Arithmetic arithmetic>
cudaError_t group_forward_fits(const Shape& shape, bool* fits);
template <Arithmetic arithmetic>
cudaError_t group_backward_fits(const Shape& shape, bool* fits);
template <Arithmetic arithmetic>
cudaError_t launch_group_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, void* exchange, cudaStream_t stream);
template <Arithmetic arithmetic>
cudaError_t launch_group_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, void* exchange,
                                  cudaStream_t stream);

}  // namespace rnnfast::cuda
