// Tier group, forward, Product::kExact: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_forward_resources<Product::kExact>(const Shape&);
template cudaError_t group_forward_fits<Product::kExact>(const Shape&, bool*);
template cudaError_t launch_group_forward<Product::kExact>(const ForwardLayer<ElementOf<Product::kExact>>&, void*,
                                                           cudaStream_t);

}  // namespace rnnfast::cuda
