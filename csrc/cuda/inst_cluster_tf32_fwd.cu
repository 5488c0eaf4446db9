// Tier cluster, forward, Product::kTf32: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_forward_resources<Product::kTf32>(const Shape&);
template cudaError_t cluster_forward_fits<Product::kTf32>(const Shape&, bool*);
template cudaError_t launch_cluster_forward<Product::kTf32>(const ForwardLayer<ElementOf<Product::kTf32>>&,
                                                            cudaStream_t);

}  // namespace rnnfast::cuda
