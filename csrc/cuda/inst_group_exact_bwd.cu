// Tier group, backward, Product::kExact: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_backward_resources<Product::kExact>(const Shape&);
template cudaError_t group_backward_fits<Product::kExact>(const Shape&, bool*);
template cudaError_t launch_group_backward<Product::kExact>(const BackwardLayer<ElementOf<Product::kExact>>&, void*,
                                                            cudaStream_t);

}  // namespace rnnfast::cuda
