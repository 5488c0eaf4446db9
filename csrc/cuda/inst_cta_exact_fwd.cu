// Tier CTA, forward, Product::kExact: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_forward_resources<Product::kExact>(const Shape&);
template cudaError_t launch_cta_forward<Product::kExact>(const ForwardLayer<ElementOf<Product::kExact>>&, cudaStream_t);

}  // namespace rnnfast::cuda
