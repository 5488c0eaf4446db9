// Tier cluster, backward, Product::kTf32: kernels of all cells and sizes.
#include "tier_cluster_launch.cuh"

namespace rnnfast::cuda {

template ClusterResources cluster_backward_resources<Product::kTf32>(const Shape&);
template cudaError_t cluster_backward_fits<Product::kTf32>(const Shape&, bool*);
template cudaError_t launch_cluster_backward<Product::kTf32>(const BackwardLayer<ElementOf<Product::kTf32>>&,
                                                             cudaStream_t);

}  // namespace rnnfast::cuda
