// The plan, the rows and the weights of one call; see host.h.
#include "cuda/host/host.h"

#include <atomic>
#include <cstdlib>
#include <limits>

#include "cuda/device/around.h"

namespace rnnfast::cuda {
namespace {

#if defined(RNNFAST_EMULATOR)
std::atomic<bool> allow_tf32{false};  // the CPU's own products are exact
#else
std::atomic<bool> allow_tf32{true};  // torch's default for its RNNs
#endif

constexpr int64_t kPiece = 16;  // bytes that one asynchronous copy moves

ScalarType wide_type(ScalarType type) {
  RNNFAST_REQUIRE(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
                  "input: the CUDA kernels take float32, bfloat16 and float16, not ", toString(type));
  return ScalarType::Float;
}

Resources resources_of(Arithmetic arithmetic, Tier tier, const Shape& shape, bool backward) {
  return with_arithmetic(
      arithmetic, [&]<Arithmetic kArithmetic>() { return resident_resources<kArithmetic>(tier, shape, backward); });
}

// Answers the questions of choose() for the compiled kernels and the current device.
struct CompiledKernels {
  const Problem& problem;

  Resources resources(Tier tier) const {
    return resources_of(problem.arithmetic, tier, problem.shape, problem.backward);
  }
  const char* unfit(Tier tier) const {
    bool fits = false;
    const cudaError_t error = with_arithmetic(problem.arithmetic, [&]<Arithmetic kArithmetic>() {
      return resident_fits<kArithmetic>(tier, problem.shape, problem.backward, &fits);
    });
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return fits ? nullptr : "its CTAs wait for each other and this device cannot run all of them at once";
  }
};

}  // namespace

void set_allow_tf32(bool allow) { allow_tf32 = allow; }

Arithmetic arithmetic_of(ScalarType type, const DeviceLimits& device) {
  if (type == ScalarType::BFloat16) return Arithmetic::kBfloat16;
  if (type == ScalarType::Half) return Arithmetic::kHalf;
  return allow_tf32 && device.capability >= 80 ? Arithmetic::kTf32 : Arithmetic::kExact;
}

Choice find_plan(const Problem& problem, const DeviceLimits& device) {
  return choose(problem, device, std::getenv("RNNFAST_TIER"), CompiledKernels{problem});
}

TensorDevice device_of(const Tensor& tensor) {
  const Facts facts(tensor);
  return {facts.device_type, facts.device_index};
}

Call::Call(const LayerInputs& in)
    : sizes(check_layer(in)),
      device(device_of(in.input)),
      type(in.input.scalar_type()),
      wide(wide_type(type)),
      limits(limits_of(device.index)),
      arithmetic(arithmetic_of(type, limits)),
      guard(device.index),
      stream(current_stream(device.index)),
      cell_(in.cell) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 4;  // kernels compute 4 * H, and round sizes up to tiles
  RNNFAST_REQUIRE(sizes.hidden_size < most && sizes.proj_size < most && sizes.batch < most && sizes.steps < most,
                  "expected sizes below ", most, ", got input ", shape_text(in.input));
}

Plan Call::plan(const LayerInputs& in, bool backward) const {
  const Choice choice = find_plan({arithmetic, backward, sizes.proj_size > 0, dense_shape(in)}, limits);
  RNNFAST_REQUIRE(choice.found, "rnnfast: no CUDA kernel takes this layer; ", choice.why());
  return choice.plan;
}

std::optional<Tensor> Call::exchange(Tier tier, const Shape& shape, bool backward) const {
  const int64_t bytes = resources_of(arithmetic, tier, shape, backward).exchange_bytes;
  if (bytes == 0) return std::nullopt;
  // Float, because tests fill new memory with NaN. Kernels must not take that for an empty slot.
  return cuda::empty(device, ScalarType::Float, {bytes / 4});
}

Shape Call::dense_shape(const LayerInputs& in) const {
  Shape shape{};
  shape.cell = in.cell;
  shape.relu = in.relu;
  shape.hidden_size = int(sizes.hidden_size);
  shape.output_size = int(sizes.output_size());
  shape.steps = int(sizes.steps);
  shape.batch = int(sizes.batch);
  shape.directions = int(sizes.directions());
  shape.rows = sizes.rows;
  return shape;
}

Shape Call::shape(const LayerInputs& in) {
  Shape shape = dense_shape(in);
  if (in.rows.batch_sizes) upload_batch_sizes(*in.rows.batch_sizes, shape);
  if (in.rows.lengths) upload_lengths(*in.rows.lengths, shape);
  return shape;
}

void Call::upload_batch_sizes(const Tensor& batch_sizes, Shape& shape) {
  const HostValues values = check_batch_sizes(batch_sizes, sizes);
  const Tensor offsets = cuda::empty(device, ScalarType::Long, {values.count});
  const Tensor lengths = cuda::empty(device, ScalarType::Int, {sizes.batch});
  check_cuda(write_schedule(values.data, values.count, write<int64_t>(offsets), write<int32_t>(lengths), stream),
             "batch_sizes");
  shape.steps = int(values.count);
  shape.offsets = read<int64_t>(offsets);
  shape.lengths = read<int32_t>(lengths);
  kept_.insert(kept_.end(), {offsets, lengths});
}

// The values are checked only if they are on the CPU. To read values on the device, the host would have to wait. A
// kernel clamps them in both cases.
void Call::upload_lengths(const Tensor& lengths, Shape& shape) {
  check_lengths(lengths, sizes);
  const bool is_int64 = lengths.scalar_type() == ScalarType::Long;
  Tensor values = as_contiguous(lengths);
  const TensorDevice from = device_of(values);
  if (values.is_cpu())
    is_int64 ? check_length_values(read<int64_t>(values), sizes) : check_length_values(read<int32_t>(values), sizes);
  if (from.type != device.type) {
    RNNFAST_REQUIRE(values.is_cpu(), "lengths: expected a tensor on the CPU or on the device of input");
    const Tensor moved = cuda::empty(device, values.scalar_type(), {sizes.batch});
    copy(moved, values);
    values = moved;
  } else {
    RNNFAST_REQUIRE(from.index == device.index, "lengths: expected the device of input");
  }
  const Tensor clamped = cuda::empty(device, ScalarType::Int, {sizes.batch});
  check_cuda(clamp_lengths(read(values), is_int64, write<int32_t>(clamped), shape.batch, shape.steps, stream),
             "lengths");
  shape.lengths = read<int32_t>(clamped);
  kept_.insert(kept_.end(), {values, clamped});
}

bool Call::rows_aligned(const void* data, int64_t size) const {
  const int64_t bytes = size * element_size(arithmetic);
  return reinterpret_cast<uintptr_t>(data) % kPiece == 0 && bytes % kPiece == 0;
}

AlignedWeight<void> Call::aligned(const Tensor& weight) {
  const int64_t rows = weight.size(0), k = weight.size(1);
  if (weight.stride(1) == 1 && rows_aligned(read(weight), weight.stride(0)) && rows_aligned(nullptr, k))
    return {read(weight), weight.stride(0)};
  const int64_t stride = round_up(k, kPiece / element_size(arithmetic));
  const Tensor padded = new_tensor({rows, stride});
  if (stride != k) zero(padded);
  copy(view(padded, {rows, k}, {stride, 1}), weight);
  kept_.push_back(padded);
  return {read(padded), stride};
}

AlignedWeight<void> Call::aligned_transpose(const Tensor& weight) {
  const int64_t rows = weight.size(1), k = weight.size(0), stride = round_up(k, kPiece / element_size(arithmetic));
  const Tensor padded = new_tensor({rows, stride});
  if (stride != k) zero(padded);
  copy(view(padded, {k, rows}, {1, stride}), weight);
  kept_.push_back(padded);
  return {read(padded), stride};
}

const void* Call::ready(const Tensor& tensor) {
  if (tensor.is_contiguous()) return read(tensor);
  kept_.push_back(torch::stable::contiguous(tensor));
  return read(kept_.back());
}

void Call::ready_weights(const LayerInputs& in, Weights<void> (&weights)[kMaxDirections]) {
  const LayerWeights own(sizes.weights, in.weights);
  for (int64_t d = 0; d < sizes.directions(); ++d) {
    weights[d].weight_hh = ready(own.weight_hh(d));
    if (own.is_projected()) weights[d].weight_hr = ready(own.weight_hr(d));
  }
}

const void* Call::bias_hn(const LayerInputs& in, int64_t direction) {
  const LayerWeights own(sizes.weights, in.weights);
  if (cell_ != Cell::kGru || !own.has_biases()) return nullptr;
  const void* const bias_hh = ready(own.bias_hh(direction));
  return static_cast<const char*>(bias_hh) + 2 * sizes.hidden_size * element_size(arithmetic);
}

}  // namespace rnnfast::cuda
