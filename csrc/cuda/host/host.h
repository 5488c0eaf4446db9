// What forward and backward share on the host: the plan of a call, its rows, and its weights in the form that kernels
// read.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/check_layer.h"
#include "common/layers.h"
#include "cuda/host/tensors.h"
#include "cuda/layer.h"
#include "cuda/plan/device.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/tiers.h"

namespace rnnfast::cuda {

// Whether float32 layers may multiply in TF32. The setting is process-wide, like torch's.
void set_allow_tf32(bool allow);
Arithmetic arithmetic_of(ScalarType type, const DeviceLimits& device);

// The plan of a problem on the current device. `device` has its limits. RNNFAST_TIER forces a tier.
Choice find_plan(const Problem& problem, const DeviceLimits& device);

TensorDevice device_of(const Tensor& tensor);

// One call of an operator. The constructor checks the arguments. Copies that kernels read live as long as the Call.
class Call {
 public:
  explicit Call(const LayerInputs& in);

  const LayerSizes sizes;
  const TensorDevice device;
  const ScalarType type;
  const ScalarType wide;  // of c and of values carried from step to step
  const DeviceLimits limits;
  const Arithmetic arithmetic;
  const DeviceGuard guard;
  const cudaStream_t stream;

  // The shape as if the batch were padded and had no lengths.
  Shape dense_shape(const LayerInputs& in) const;
  // The shape with the batch's own rows. Copies batch_sizes or lengths to the device. Not for an empty batch.
  Shape shape(const LayerInputs& in);

  // Refuses the call, with the reasons, where no tier can run the layer.
  Plan plan(const LayerInputs& in, bool backward) const;
  bool empty() const { return sizes.batch == 0 || sizes.rows == 0; }
  int64_t gate_rows() const { return gate_count(cell_) * sizes.hidden_size; }
  Tensor new_tensor(std::initializer_list<int64_t> shape) const { return cuda::empty(device, type, shape); }

  // A matrix [R, K] with contiguous K. Its rows are 16-byte aligned and padded by zeros. It is the weight itself if
  // that has this form, else a copy.
  AlignedWeight<void> aligned(const Tensor& weight);
  // The transpose in the same form; always a copy.
  AlignedWeight<void> aligned_transpose(const Tensor& weight);
  // The workspace in which the CTAs of a resident tier exchange values; null where the tier needs none. It comes from
  // torch's allocator on the call's stream, so a CUDA graph can capture the call.
  std::optional<Tensor> exchange(Tier tier, const Shape& shape, bool backward) const;
  // Contiguous weight_hh and weight_hr of every direction, for the resident tiers.
  void ready_weights(const LayerInputs& in, Weights<void> (&weights)[kMaxDirections]);
  // The GRU's b_hn of a direction; null for other cells and without biases.
  const void* bias_hn(const LayerInputs& in, int64_t direction);
  // The tensor's data, contiguous, at any alignment; a copy only where it must be.
  const void* ready(const Tensor& tensor);
  const void* ready(const std::optional<Tensor>& tensor) { return tensor ? ready(*tensor) : nullptr; }
  // Whether all rows of `size` elements are 16-byte aligned. `data` is the first row.
  bool rows_aligned(const void* data, int64_t size) const;

 private:
  void upload_batch_sizes(const Tensor& batch_sizes, Shape& shape);
  void upload_lengths(const Tensor& lengths, Shape& shape);

  const Cell cell_;
  std::vector<Tensor> kept_;  // copies that the kernels of this call read
};

// Calls `run` with the arithmetic as a template argument.
template <class Run>
auto with_arithmetic(Arithmetic arithmetic, Run&& run) {
  switch (arithmetic) {
    case Arithmetic::kBfloat16:
      return run.template operator()<Arithmetic::kBfloat16>();
    case Arithmetic::kHalf:
      return run.template operator()<Arithmetic::kHalf>();
    case Arithmetic::kTf32:
      return run.template operator()<Arithmetic::kTf32>();
    default:
      return run.template operator()<Arithmetic::kExact>();
  }
}

}  // namespace rnnfast::cuda
