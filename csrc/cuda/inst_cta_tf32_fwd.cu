// Tier CTA, forward, Product::kTf32: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_forward_resources<Product::kTf32>(const Shape&);
template cudaError_t launch_cta_forward<Product::kTf32>(const ForwardLayer<ElementOf<Product::kTf32>>&, cudaStream_t);

}  // namespace rnnfast::cuda
