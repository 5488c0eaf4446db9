// Tier cluster: the kernels of all cells and sizes, for one arithmetic and one pass. It is compiled once for each pair.
// The command defines RNNFAST_ARITHMETIC and RNNFAST_BACKWARD (kernel_build/sources.py).
#include "cuda/tiers/cluster/launch.cuh"

namespace rnnfast::cuda {

constexpr Arithmetic kInstance = Arithmetic::RNNFAST_ARITHMETIC;

#if RNNFAST_BACKWARD
template ClusterResources cluster_backward_resources<kInstance>(const Shape&);
template cudaError_t cluster_backward_fits<kInstance>(const Shape&, bool*);
template cudaError_t launch_cluster_backward<kInstance>(const BackwardLayer<ElementOf<kInstance>>&, cudaStream_t);
#else
template ClusterResources cluster_forward_resources<kInstance>(const Shape&);
template cudaError_t cluster_forward_fits<kInstance>(const Shape&, bool*);
template cudaError_t launch_cluster_forward<kInstance>(const ForwardLayer<ElementOf<kInstance>>&, cudaStream_t);
#endif

}  // namespace rnnfast::cuda
