// Tier CTA for the host: void pointers become those of the element type.
#include <bit>

#include "tier_cta.h"
#include "tiers.h"

namespace rnnfast::cuda {

template <Product kProduct>
cudaError_t run_cta_forward(const ForwardLayer<void>& layer, cudaStream_t stream) {
  return launch_cta_forward<kProduct>(std::bit_cast<ForwardLayer<ElementOf<kProduct>>>(layer), stream);
}

template <Product kProduct>
cudaError_t run_cta_backward(const BackwardLayer<void>& layer, cudaStream_t stream) {
  return launch_cta_backward<kProduct>(std::bit_cast<BackwardLayer<ElementOf<kProduct>>>(layer), stream);
}

template <Product kProduct>
int cta_shared_bytes(const Shape& shape, bool backward) {
  return (backward ? cta_backward_resources<kProduct>(shape) : cta_forward_resources<kProduct>(shape)).shared_bytes;
}

#define RNNFAST_INSTANTIATE(product)                                                                 \
  template cudaError_t run_cta_forward<Product::product>(const ForwardLayer<void>&, cudaStream_t);   \
  template cudaError_t run_cta_backward<Product::product>(const BackwardLayer<void>&, cudaStream_t); \
  template int cta_shared_bytes<Product::product>(const Shape&, bool);
RNNFAST_INSTANTIATE(kBfloat16)
RNNFAST_INSTANTIATE(kHalf)
RNNFAST_INSTANTIATE(kTf32)
RNNFAST_INSTANTIATE(kExact)

}  // namespace rnnfast::cuda
