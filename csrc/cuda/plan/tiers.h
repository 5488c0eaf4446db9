// The tiers as the host sees them. No torch and no device code: element types are void, which only kernels know; the
// definitions bit-cast them. Each function launches on `stream`; the first error ends it.
#pragma once

#include "cuda/layer.h"
#include "cuda/plan/plan.h"

#if defined(RNNFAST_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rnnfast::cuda {

// ---- tiers cta, cluster and group (resident.cu)

template <Arithmetic kArithmetic>
Resources resident_resources(Tier tier, const Shape& shape, bool backward);
// Whether the current device can run all CTAs that wait for each other at once.
template <Arithmetic kArithmetic>
cudaError_t resident_fits(Tier tier, const Shape& shape, bool backward, bool* fits);
// `exchange`: the resources' exchange_bytes for this layer, aligned to 16; null where they are 0. The gradients of the
// states are written in any case.
template <Arithmetic kArithmetic>
cudaError_t run_resident_forward(Tier tier, const ForwardLayer<void>& layer, void* exchange, cudaStream_t stream);
template <Arithmetic kArithmetic>
cudaError_t run_resident_backward(Tier tier, const BackwardLayer<void>& layer, void* exchange, cudaStream_t stream);

// ---- tier step (tiers/step/instance.cu)

// A weight as the product reads it: rows 16-byte aligned, K padded by zeros to whole 16 bytes.
template <class Element>
struct AlignedWeight {
  const Element* data;
  int64_t stride;  // elements
};

template <class Element>
struct StepForward : ForwardLayer<Element> {
  AlignedWeight<Element> recurrent[kMaxDirections];   // weight_hh [G*H, P]
  AlignedWeight<Element> projection[kMaxDirections];  // weight_hr [P, H]
  float* carry;                                       // [D, B, H]: c between steps; LSTM's inference only
  Element* unprojected;                               // [D, B, H]: o tanh(c); projected only
  bool aligned;              // rows of hx and output are 16-byte aligned, P is a multiple of 16 bytes
  bool aligned_unprojected;  // the same of unprojected and H
};

template <class Element>
struct StepBackward : BackwardLayer<Element> {
  AlignedWeight<Element> recurrent[kMaxDirections];   // weight_hh^T [P, G*H]
  AlignedWeight<Element> projection[kMaxDirections];  // weight_hr^T [H, P]
  float* carry;                                       // [D, B, H]: between steps LSTM's dc, GRU's dh z
  bool aligned;            // rows of grad_gates that W_hh multiplies are 16-byte aligned, G*H is a multiple of 16 bytes
  bool aligned_projected;  // the same of grad_projected and P
};

template <Arithmetic kArithmetic>
cudaError_t run_step_forward(const StepForward<void>& call, bool large, cudaStream_t stream);
template <Arithmetic kArithmetic>
cudaError_t run_step_backward(const StepBackward<void>& call, bool large, cudaStream_t stream);

}  // namespace rnnfast::cuda
