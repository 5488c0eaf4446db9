// Tier group: the kernels of all cells and sizes, for one arithmetic and one pass. It is compiled once for each pair.
// The command defines RNNFAST_ARITHMETIC and RNNFAST_BACKWARD (kernel_build/sources.py).
#include "cuda/tiers/group/launch.cuh"

namespace rnnfast::cuda {

constexpr Arithmetic kInstance = Arithmetic::RNNFAST_ARITHMETIC;

#if RNNFAST_BACKWARD
template GroupResources group_backward_resources<kInstance>(const Shape&);
template cudaError_t group_backward_fits<kInstance>(const Shape&, bool*);
template cudaError_t launch_group_backward<kInstance>(const BackwardLayer<ElementOf<kInstance>>&, void*, cudaStream_t);
#else
template GroupResources group_forward_resources<kInstance>(const Shape&);
template cudaError_t group_forward_fits<kInstance>(const Shape&, bool*);
template cudaError_t launch_group_forward<kInstance>(const ForwardLayer<ElementOf<kInstance>>&, void*, cudaStream_t);
#endif

}  // namespace rnnfast::cuda
