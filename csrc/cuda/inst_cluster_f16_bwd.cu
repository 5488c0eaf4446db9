// Tier cluster, backward, Product::kHalf: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_backward_resources<Product::kHalf>(const Shape&);
template cudaError_t cluster_backward_fits<Product::kHalf>(const Shape&, bool*);
template cudaError_t launch_cluster_backward<Product::kHalf>(const BackwardLayer<ElementOf<Product::kHalf>>&,
                                                             cudaStream_t);

}  // namespace rnnfast::cuda
