// Tier step with float16 products.
#include "tier_step_bwd.cuh"

template cudaError_t rnnfast::cuda::run_step_forward<rnnfast::cuda::Product::kHalf>(const StepForward<void>&, bool,
                                                                                    cudaStream_t);
template cudaError_t rnnfast::cuda::run_step_backward<rnnfast::cuda::Product::kHalf>(const StepBackward<void>&, bool,
                                                                                     cudaStream_t);
