// Tier cluster, forward, Product::kExact: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_forward_resources<Product::kExact>(const Shape&);
template cudaError_t cluster_forward_fits<Product::kExact>(const Shape&, bool*);
template cudaError_t launch_cluster_forward<Product::kExact>(const ForwardLayer<ElementOf<Product::kExact>>&,
                                                             cudaStream_t);

}  // namespace rnnfast::cuda
