// What forward and backward of a layer share on the host: the plan of a call, its rows, its weights as kernels want
// them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/layers.h"
#include "cuda/host/tensors.h"
#include "cuda/layer.h"
#include "cuda/plan/device.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/tiers.h"

namespace rnnfast::cuda {

// Whether float32 layers may multiply in TF32. Process-wide, as torch.backends.cudnn.rnn.fp32_precision is.
void set_allow_tf32(bool allow);
Arithmetic arithmetic_of(ScalarType type, const DeviceLimits& device);

// The plan of a problem on the current device, whose limits are given. RNNFAST_TIER forces a tier.
Choice find_plan(const Problem& problem, const DeviceLimits& device);

Place place_of(const Tensor& tensor);

// One call: what is known before anything is allocated, and what all launches need.
class Call {
 public:
  explicit Call(const LayerInputs& in);

  const LayerSizes sizes;
  const Place place;
  const ScalarType type, wide;  // wide: of c and of carries
  const DeviceLimits limits;
  const Arithmetic arithmetic;
  const DeviceGuard guard;
  const cudaStream_t stream;

  // The sizes of the layer, without its rows.
  Shape dense_shape(const LayerInputs& in) const;
  // The same with its rows; uploads the schedule of ragged ones. Not for an empty batch.
  Shape shape(const LayerInputs& in);

  // Raises the reason where no tier can run the layer.
  Plan plan(const LayerInputs& in, bool backward) const;
  bool empty() const { return sizes.batch == 0 || sizes.rows == 0; }
  int64_t gate_rows() const { return gate_count(cell_) * sizes.hidden_size; }
  Tensor new_tensor(std::initializer_list<int64_t> shape) const { return cuda::empty(place, type, shape); }

  // [R, K] with K contiguous, rows 16-byte aligned and padded by zeros; the weight itself where it is so.
  AlignedWeight<void> aligned(const Tensor& weight);
  // The same of the transpose, always a copy.
  AlignedWeight<void> aligned_transpose(const Tensor& weight);
  // The workspace that the CTAs of a resident tier exchange values in, of the layer with its rows; none where they need
  // none. Of torch's allocator and on the call's stream, so a CUDA graph can capture the call.
  std::optional<Tensor> exchange(Tier tier, const Shape& shape, bool backward) const;
  // weight_hh and weight_hr of every direction, contiguous, for the tiers that keep them on chip.
  void ready_weights(const LayerInputs& in, Weights<void> (&weights)[kMaxDirections]);
  // GRU's b_hn of a direction; null where there is none.
  const void* bias_hn(const LayerInputs& in, int64_t direction);
  // Contiguous for the time of the call, at any address.
  const void* ready(const Tensor& tensor);
  const void* ready(const std::optional<Tensor>& tensor) { return tensor ? ready(*tensor) : nullptr; }
  // Whether rows of `size` elements, the first at `data`, are all 16-byte aligned.
  bool rows_aligned(const void* data, int64_t size) const;

 private:
  void upload_batch_sizes(const Tensor& batch_sizes, Shape& shape);
  void upload_lengths(const Tensor& lengths, Shape& shape);

  const Cell cell_;
  std::vector<Tensor> kept_;  // copies that kernels of this call read
};

// Calls `run` with the product as a template argument.
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
