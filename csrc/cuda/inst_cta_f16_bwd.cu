// Tier CTA, backward, Product::kHalf: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_backward_resources<Product::kHalf>(const Shape&);
template cudaError_t launch_cta_backward<Product::kHalf>(const BackwardLayer<ElementOf<Product::kHalf>>&, cudaStream_t);

}  // namespace rnnfast::cuda
