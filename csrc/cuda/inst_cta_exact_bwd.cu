// Tier CTA, backward, Product::kExact: kernels of all cells and sizes.
#include "tier_cta_launch.cuh"

namespace rnnfast::cuda {

template CtaResources cta_backward_resources<Product::kExact>(const Shape&);
template cudaError_t launch_cta_backward<Product::kExact>(const BackwardLayer<ElementOf<Product::kExact>>&,
                                                          cudaStream_t);

}  // namespace rnnfast::cuda
