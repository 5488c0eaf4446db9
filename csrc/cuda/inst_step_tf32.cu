// Tier step with TF32 products.
#include "tier_step_bwd.cuh"

template cudaError_t rnnfast::cuda::run_step_forward<rnnfast::cuda::Product::kTf32>(const StepForward<void>&, bool,
                                                                                    cudaStream_t);
template cudaError_t rnnfast::cuda::run_step_backward<rnnfast::cuda::Product::kTf32>(const StepBackward<void>&, bool,
                                                                                     cudaStream_t);
