// Tier group, forward, Product::kHalf: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_forward_resources<Product::kHalf>(const Shape&);
template cudaError_t group_forward_fits<Product::kHalf>(const Shape&, bool*);
template cudaError_t launch_group_forward<Product::kHalf>(const ForwardLayer<ElementOf<Product::kHalf>>&, void*,
                                                          cudaStream_t);

}  // namespace rnnfast::cuda
