// Tier CTA: the kernels of all cells and sizes, for one arithmetic and one pass. It is compiled once for each pair. The
// command defines RNNFAST_ARITHMETIC and RNNFAST_BACKWARD (kernel_build/sources.py).
#include "cuda/tiers/cta/launch.cuh"

namespace rnnfast::cuda {

constexpr Arithmetic kInstance = Arithmetic::RNNFAST_ARITHMETIC;

#if RNNFAST_BACKWARD
template CtaResources cta_backward_resources<kInstance>(const Shape&);
template cudaError_t launch_cta_backward<kInstance>(const BackwardLayer<ElementOf<kInstance>>&, cudaStream_t);
#else
template CtaResources cta_forward_resources<kInstance>(const Shape&);
template cudaError_t launch_cta_forward<kInstance>(const ForwardLayer<ElementOf<kInstance>>&, cudaStream_t);
#endif

}  // namespace rnnfast::cuda
