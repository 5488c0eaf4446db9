// Tier cluster, backward, Product::kExact: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_backward_resources<Product::kExact>(const Shape&);
template cudaError_t cluster_backward_fits<Product::kExact>(const Shape&, bool*);
template cudaError_t launch_cluster_backward<Product::kExact>(const BackwardLayer<ElementOf<Product::kExact>>&,
                                                              cudaStream_t);

}  // namespace rnnfast::cuda
