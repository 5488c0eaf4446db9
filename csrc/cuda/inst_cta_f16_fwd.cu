// Tier CTA, forward, Product::kHalf: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_forward_resources<Product::kHalf>(const Shape&);
template cudaError_t launch_cta_forward<Product::kHalf>(const ForwardLayer<ElementOf<Product::kHalf>>&, cudaStream_t);

}  // namespace rnnfast::cuda
