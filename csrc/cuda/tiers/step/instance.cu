// Tier step: the kernels of all cells and tiles, for one arithmetic. It is compiled once for each. The command defines
// RNNFAST_ARITHMETIC (kernel_build/sources.py).
#include "cuda/tiers/step/backward.cuh"

namespace rnnfast::cuda {

constexpr Arithmetic kInstance = Arithmetic::RNNFAST_ARITHMETIC;

template cudaError_t run_step_forward<kInstance>(const StepForward<void>&, bool, cudaStream_t);
template cudaError_t run_step_backward<kInstance>(const StepBackward<void>&, bool, cudaStream_t);

}  // namespace rnnfast::cuda
