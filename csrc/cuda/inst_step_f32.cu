// Tier step with exact float32 products.
#include "tier_step_bwd.cuh"

template cudaError_t rnnfast::cuda::run_step_forward<rnnfast::cuda::Product::kExact>(const StepForward<void>&, bool,
                                                                                     cudaStream_t);
template cudaError_t rnnfast::cuda::run_step_backward<rnnfast::cuda::Product::kExact>(const StepBackward<void>&, bool,
                                                                                      cudaStream_t);
