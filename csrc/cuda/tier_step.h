// What the host hands to tier step: a layer, its weights in the form that the tier reads, scratch. No torch, no device code.
#pragma once

#include "layer.h"

#if defined(RNNFAST_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rnnfast::cuda {

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
  float* carry;        // [D, B, H]: c between steps; LSTM's inference only
  Element* cells;      // [D, B, H]: o tanh(c); projected only
  bool aligned;        // rows of hx and output are 16-byte aligned, P is a multiple of 16 bytes
  bool aligned_cells;  // the same of cells and H
};

template <class Element>
struct StepBackward : BackwardLayer<Element> {
  AlignedWeight<Element> recurrent[kMaxDirections];   // weight_hh^T [P, G*H]
  AlignedWeight<Element> projection[kMaxDirections];  // weight_hr^T [H, P]
  float* carry;            // [D, B, H]: between steps LSTM's dc, GRU's dh z
  bool aligned;            // rows of grad_gates that W_hh multiplies are 16-byte aligned, G*H is a multiple of 16 bytes
  bool aligned_projected;  // the same of grad_projected and P
};

// All steps of a layer, launched on `stream`; the first error ends it. Defined in tier_step_{fwd,bwd}.cuh, instantiated
// in inst_step_*.cu. Element types are void here because only device code knows them.
template <Product kProduct>
cudaError_t run_step_forward(const StepForward<void>& call, bool large, cudaStream_t stream);
template <Product kProduct>
cudaError_t run_step_backward(const StepBackward<void>& call, bool large, cudaStream_t stream);

}  // namespace rnnfast::cuda
