// Tier cluster, forward, Product::kBfloat16: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_forward_resources<Product::kBfloat16>(const Shape&);
template cudaError_t cluster_forward_fits<Product::kBfloat16>(const Shape&, bool*);
template cudaError_t launch_cluster_forward<Product::kBfloat16>(const ForwardLayer<ElementOf<Product::kBfloat16>>&,
                                                                cudaStream_t);

}  // namespace rnnfast::cuda
