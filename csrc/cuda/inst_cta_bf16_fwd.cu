// Tier CTA, forward, Product::kBfloat16: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_forward_resources<Product::kBfloat16>(const Shape&);
template cudaError_t launch_cta_forward<Product::kBfloat16>(const ForwardLayer<ElementOf<Product::kBfloat16>>&,
                                                            cudaStream_t);

}  // namespace rnnfast::cuda
