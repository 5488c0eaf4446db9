// Tier group, backward, Product::kTf32: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_backward_resources<Product::kTf32>(const Shape&);
template cudaError_t group_backward_fits<Product::kTf32>(const Shape&, bool*);
template cudaError_t launch_group_backward<Product::kTf32>(const BackwardLayer<ElementOf<Product::kTf32>>&, void*,
                                                           cudaStream_t);

}  // namespace rnnfast::cuda
