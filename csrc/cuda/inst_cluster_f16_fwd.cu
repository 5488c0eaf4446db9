// Tier cluster, forward, Product::kHalf: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_forward_resources<Product::kHalf>(const Shape&);
template cudaError_t cluster_forward_fits<Product::kHalf>(const Shape&, bool*);
template cudaError_t launch_cluster_forward<Product::kHalf>(const ForwardLayer<ElementOf<Product::kHalf>>&,
                                                            cudaStream_t);

}  // namespace rnnfast::cuda
