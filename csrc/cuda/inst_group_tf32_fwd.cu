// Tier group, forward, Product::kTf32: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_forward_resources<Product::kTf32>(const Shape&);
template cudaError_t group_forward_fits<Product::kTf32>(const Shape&, bool*);
template cudaError_t launch_group_forward<Product::kTf32>(const ForwardLayer<ElementOf<Product::kTf32>>&, void*,
                                                          cudaStream_t);

}  // namespace rnnfast::cuda
