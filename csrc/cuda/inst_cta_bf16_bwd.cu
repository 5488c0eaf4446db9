// Tier CTA, backward, Product::kBfloat16: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_backward_resources<Product::kBfloat16>(const Shape&);
template cudaError_t launch_cta_backward<Product::kBfloat16>(const BackwardLayer<ElementOf<Product::kBfloat16>>&,
                                                             cudaStream_t);

}  // namespace rnnfast::cuda
