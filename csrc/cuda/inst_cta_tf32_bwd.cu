// Tier CTA, backward, Product::kTf32: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_backward_resources<Product::kTf32>(const Shape&);
template cudaError_t launch_cta_backward<Product::kTf32>(const BackwardLayer<ElementOf<Product::kTf32>>&, cudaStream_t);

}  // namespace rnnfast::cuda
