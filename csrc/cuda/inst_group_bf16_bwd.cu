// Tier group, backward, Product::kBfloat16: kernels of all cells and sizes.
#include "tier_group_launch.cuh"

namespace rnnfast::cuda {

template GroupResources group_backward_resources<Product::kBfloat16>(const Shape&);
template cudaError_t group_backward_fits<Product::kBfloat16>(const Shape&, bool*);
template cudaError_t launch_group_backward<Product::kBfloat16>(const BackwardLayer<ElementOf<Product::kBfloat16>>&,
                                                               void*, cudaStream_t);

}  // namespace rnnfast::cuda
