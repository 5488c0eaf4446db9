// Launches of tier CTA: which of the compiled kernels serves a shape. For instance.cu and tests.
#pragma once

#include "cuda/tiers/cta/backward.cuh"
#include "cuda/tiers/cta/forward.cuh"

namespace rnnfast::cuda {

// The padded H of the kernels that exist. In 16 bits: multiples of 32, because a step's products grow with H^2. Float
// has half the range and fewer sizes. Each size costs half a second of compilation per architecture.
constexpr int cta_padded_hidden(Arithmetic arithmetic, int hidden) {
  if (hidden > 128) return 256;  // RNN only
  if (!is_16_bit(arithmetic)) return hidden <= 32 ? 32 : hidden <= 64 ? 64 : 128;
  return round_up(hidden, 32);
}

// Calls use.template operator()<cell, kHidden, kProjected>() for the kernel that serves `shape`.
template <Arithmetic arithmetic, class Use>
auto with_cta_kernel(const Shape& shape, Use use) {
  const int hidden = cta_padded_hidden(arithmetic, shape.hidden_size);
  const auto sizes = [&]<Cell cell, bool kProjected>() {
    if constexpr (cta_largest_hidden(arithmetic, cell) >= 256)
      if (hidden == 256) return use.template operator()<cell, 256, kProjected>();
    if constexpr (cta_largest_hidden(arithmetic, cell) >= 128)
      if (hidden == 128) return use.template operator()<cell, 128, kProjected>();
    if constexpr (is_16_bit(arithmetic))
      if (hidden == 96) return use.template operator()<cell, 96, kProjected>();
    if (hidden == 64) return use.template operator()<cell, 64, kProjected>();
    return use.template operator()<cell, 32, kProjected>();
  };
  if (shape.cell == Cell::kRnn) return sizes.template operator()<Cell::kRnn, false>();
  if (shape.cell == Cell::kGru) return sizes.template operator()<Cell::kGru, false>();
  return is_projected(shape) ? sizes.template operator()<Cell::kLstm, true>()
                             : sizes.template operator()<Cell::kLstm, false>();
}

inline dim3 cta_grid(const Shape& shape) {
  return {unsigned((shape.batch + kColumns - 1) / kColumns), unsigned(shape.directions)};
}

// Launches kernel(layer), unless no kernel serves the layer or there is nothing to do.
template <Arithmetic arithmetic, class Traits, class Layer>
cudaError_t launch_cta(void (*kernel)(Layer), const Layer& layer, cudaStream_t stream) {
  if (cta_refuses(arithmetic, layer)) return cudaErrorInvalidConfiguration;
  if (layer.batch == 0) return cudaSuccess;
  return launch(kernel, cta_grid(layer), dim3(Traits::kThreads), 1, false, Traits::kSharedBytes, stream, layer);
}

template <Arithmetic arithmetic>
CtaResources cta_forward_resources(const Shape& shape) {
  return with_cta_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    using Traits = CtaForward<arithmetic, cell, kHidden, kProjected>;
    return CtaResources{Traits::kThreads, Traits::kSharedBytes};
  });
}

template <Arithmetic arithmetic>
CtaResources cta_backward_resources(const Shape& shape) {
  return with_cta_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    using Traits = CtaBackward<arithmetic, cell, kHidden, kProjected>;
    return CtaResources{Traits::kThreads, Traits::kSharedBytes};
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_cta_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream) {
  return with_cta_kernel<arithmetic>(layer, [&]<Cell cell, int kHidden, bool kProjected>() {
    return launch_cta<arithmetic, CtaForward<arithmetic, cell, kHidden, kProjected>>(
        cta_forward<arithmetic, cell, kHidden, kProjected>, layer, stream);
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_cta_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream) {
  return with_cta_kernel<arithmetic>(layer, [&]<Cell cell, int kHidden, bool kProjected>() {
    return launch_cta<arithmetic, CtaBackward<arithmetic, cell, kHidden, kProjected>>(
        cta_backward<arithmetic, cell, kHidden, kProjected>, layer, stream);
  });
}

}  // namespace rnnfast::cuda
