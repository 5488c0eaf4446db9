// Tier group, backward, Product::kHalf: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_backward_resources<Product::kHalf>(const Shape&);
template cudaError_t group_backward_fits<Product::kHalf>(const Shape&, bool*);
template cudaError_t launch_group_backward<Product::kHalf>(const BackwardLayer<ElementOf<Product::kHalf>>&, void*,
                                                           cudaStream_t);

}  // namespace rnnfast::cuda
