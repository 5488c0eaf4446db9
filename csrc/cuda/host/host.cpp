// The plan, rows and weights of one call; see host.h.
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

constexpr int64_t kPiece = 16;  // bytes of one asynchronous copy

ScalarType wide_type(ScalarType type) {
  RNNFAST_REQUIRE(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
                  "input: the CUDA kernels take float32, bfloat16 and float16, not ", toString(type));
  return ScalarType::Float;
}

Resources resources_of(Arithmetic arithmetic, Tier tier, const Shape& shape, bool backward) {
  return with_arithmetic(
      arithmetic, [&]<Arithmetic kArithmetic>() { return resident_resources<kArithmetic>(tier, shape, backward); });
}

// What choose() asks of the compiled kernels and the current device.
struct Kernels {
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
  return choose(problem, device, std::getenv("RNNFAST_TIER"), Kernels{problem});
}

Place place_of(const Tensor& tensor) {
  const Facts facts(tensor);
  return {facts.device_type, facts.device_index};
}

Call::Call(const LayerInputs& in)
    : sizes(check_layer(in)),
      place(place_of(in.input)),
      type(in.input.scalar_type()),
      wide(wide_type(type)),
      limits(limits_of(place.device_index)),
      arithmetic(arithmetic_of(type, limits)),
      guard(place.device_index),
      stream(current_stream(place.device_index)),
      cell_(in.cell) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 4;  // four planes of H, and a tile more of anything
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
  return cuda::empty(place, ScalarType::Float, {bytes / 4});  // tests fill it with NaN, which is no empty slot
}

Shape Call::dense_shape(const LayerInputs& in) const {
  Shape shape{};
  shape.cell = in.cell;
  shape.relu = in.relu;
  shape.hidden_size = int(sizes.hidden_size);
  shape.output_size = int(sizes.output_size());
  shape.steps = int(sizes.steps);
  shape.batch = int(sizes.batch);
  shape.directions = int(sizes.directions);
  shape.rows = sizes.rows;
  return shape;
}

Shape Call::shape(const LayerInputs& in) {
  Shape shape = dense_shape(in);
  if (in.batch_sizes) upload_batch_sizes(*in.batch_sizes, shape);
  if (in.lengths) upload_lengths(*in.lengths, shape);
  return shape;
}

void Call::upload_batch_sizes(const Tensor& batch_sizes, Shape& shape) {
  RNNFAST_REQUIRE(batch_sizes.is_cpu() && batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
                  "batch_sizes: expected a one-dimensional int64 tensor on the CPU");
  check_memory(batch_sizes, Facts(batch_sizes), {"batch_sizes"});
  const Tensor host = as_contiguous(batch_sizes);
  const int64_t* const values = read<int64_t>(host);
  const int64_t steps = host.numel();
  int64_t total = 0, limit = sizes.batch;
  for (int64_t t = 0; t < steps; ++t) {
    RNNFAST_REQUIRE(values[t] > 0 && values[t] <= limit,
                    "batch_sizes: expected positive sizes in descending order, at most ", sizes.batch, ", got ",
                    values[t]);
    limit = values[t];
    total += values[t];
  }
  RNNFAST_REQUIRE(steps && values[0] == sizes.batch && total == sizes.rows,
                  "batch_sizes: expected the first to be the batch of hx (", sizes.batch,
                  ") and their sum to be the rows of input (", sizes.rows, "), got ", steps ? values[0] : 0, " and ",
                  total);
  const Tensor offsets = cuda::empty(place, ScalarType::Long, {steps});
  const Tensor lengths = cuda::empty(place, ScalarType::Int, {sizes.batch});
  check(write_schedule(values, steps, write<int64_t>(offsets), write<int32_t>(lengths), stream), "batch_sizes");
  shape.steps = int(steps);
  shape.offsets = read<int64_t>(offsets);
  shape.lengths = read<int32_t>(lengths);
  kept_.insert(kept_.end(), {offsets, lengths});
}

// Lengths on the CPU are checked here; those on the device only there, by clamping: to look at them would mean to wait.
void Call::upload_lengths(const Tensor& lengths, Shape& shape) {
  check_shape(lengths, {sizes.batch}, {"lengths"});
  const bool wide_lengths = lengths.scalar_type() == ScalarType::Long;
  RNNFAST_REQUIRE(wide_lengths || lengths.scalar_type() == ScalarType::Int, "lengths: expected int32 or int64, got ",
                  toString(lengths.scalar_type()));
  Tensor values = as_contiguous(lengths);
  const Facts facts(values);
  if (values.is_cpu()) {
    for (int64_t b = 0; b < sizes.batch; ++b) {
      const int64_t length = wide_lengths ? read<int64_t>(values)[b] : read<int32_t>(values)[b];
      RNNFAST_REQUIRE(length >= 0 && length <= sizes.steps, "lengths: expected values from 0 to ", sizes.steps,
                      ", got ", length);
    }
  }
  if (facts.device_type != place.device_type) {
    RNNFAST_REQUIRE(values.is_cpu(), "lengths: expected a tensor on the CPU or on the device of input");
    const Tensor moved = cuda::empty(place, values.scalar_type(), {sizes.batch});
    copy(moved, values);
    values = moved;
  } else {
    RNNFAST_REQUIRE(facts.device_index == place.device_index, "lengths: expected the device of input");
  }
  const Tensor clamped = cuda::empty(place, ScalarType::Int, {sizes.batch});
  check(clamp_lengths(read(values), wide_lengths, write<int32_t>(clamped), shape.batch, shape.steps, stream),
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
  for (int64_t d = 0; d < sizes.directions; ++d) {
    const Tensor* const own = in.weights.data() + d * sizes.weights_per_direction;
    weights[d].weight_hh = ready(own[1]);
    if (sizes.proj_size) weights[d].weight_hr = ready(own[sizes.weights_per_direction - 1]);
  }
}

const void* Call::bias_hn(const LayerInputs& in, int64_t direction) {
  if (in.cell != Cell::kGru || !sizes.has_biases) return nullptr;
  const void* const bias_hh = ready(in.weights[size_t(direction * sizes.weights_per_direction + 3)]);
  return static_cast<const char*>(bias_hh) + 2 * sizes.hidden_size * element_size(arithmetic);
}

}  // namespace rnnfast::cuda
