// Tier CTA: one CTA runs the whole recurrence of a batch tile (8 sequences) in one direction. Host side, without torch.
#pragma once

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

// What a launch of a shape takes of an SM.
struct CtaResources {
  int threads;
  int shared_bytes;
};

// Why no kernel serves a shape. Null: one does.
inline const char* cta_refuses(Arithmetic arithmetic, const Shape& shape) {
  return shape.hidden_size > cta_largest_hidden(arithmetic, shape.cell) ? "weight_hh exceeds the registers of one CTA"
                                                                        : nullptr;
}

// For shapes that are not refused. Grid: ceil(B / 8) x D.
template <Arithmetic arithmetic>
CtaResources cta_forward_resources(const Shape& shape);
template <Arithmetic arithmetic>
CtaResources cta_backward_resources(const Shape& shape);
template <Arithmetic arithmetic>
cudaError_t launch_cta_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream);
template <Arithmetic arithmetic>
cudaError_t launch_cta_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream);

}  // namespace rnnfast::cuda
