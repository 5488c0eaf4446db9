// Layers on the CPU. Each function checks the arguments, lays out the rows, allocates the results and calls a kernel.
//
// If the machine has dpbf16ps, kernels multiply bfloat16 directly, with sums and c in float32. All other 16-bit tensors
// are converted to float32 first, and the results are rounded once at the end.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check_layer.h"
#include "common/layers.h"
#include "cpu/host/packed_layout.h"
#include "cpu/host/tensors.h"
#include "cpu/layer.h"

namespace rnnfast {
namespace {

using torch::headeronly::ScalarType;

// The dtypes of a call.
struct Types {
  ScalarType tensors;  // of the operator's arguments and results
  ScalarType compute;  // of sums, activations and c
  ScalarType storage;  // of the tensors that the kernel reads and writes
  bool converts() const { return storage != tensors; }
};

Types types_of(const Tensor& input, bool native_bf16) {
  const ScalarType type = input.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  RNNFAST_REQUIRE(half || type == ScalarType::Float || type == ScalarType::Double,
                  "input: expected float32, float64, bfloat16 or float16, got ", toString(type));
  const ScalarType compute = half ? ScalarType::Float : type;
  return {type, compute, type == ScalarType::BFloat16 && native_bf16 ? type : compute};
}

// The tensor as a kernel reads it: contiguous, of the storage type. It is a copy only if the tensor has another form.
Tensor ready(const Tensor& tensor, const Types& types) {
  const Tensor converted = types.converts() ? torch::stable::to(tensor, types.storage) : tensor;
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

Tensors converted(const Tensors& tensors, ScalarType type) {
  Tensors result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::to(tensor, type));
  return result;
}

LayerShape shape_of(const LayerInputs& in, const LayerSizes& sizes) {
  return {in.cell, in.relu, sizes.input_size, sizes.hidden_size, sizes.proj_size, sizes.directions()};
}

Weight matrix_of(const Tensor& tensor) {
  int64_t* strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  return {tensor.const_data_ptr(), strides[0], strides[1]};
}
Weight vector_of(const Tensor& tensor) {
  int64_t* strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  return {tensor.const_data_ptr(), strides[0], 0};
}

DirectionWeights weights_of(const LayerWeights& weights, int64_t direction) {
  DirectionWeights result;
  result.ih = matrix_of(weights.weight_ih(direction));
  result.hh = matrix_of(weights.weight_hh(direction));
  if (weights.has_biases()) {
    result.bias_ih = vector_of(weights.bias_ih(direction));
    result.bias_hh = vector_of(weights.bias_hh(direction));
  }
  if (weights.is_projected()) result.hr = matrix_of(weights.weight_hr(direction));
  return result;
}

template <class T>
const T* read(const Tensor& tensor, int64_t offset = 0) {
  return static_cast<const T*>(tensor.const_data_ptr()) + offset;
}
template <class T>
T* write(const Tensor& tensor, int64_t offset = 0) {
  return static_cast<T*>(tensor.mutable_data_ptr()) + offset;
}

// A state as a kernel reads it: contiguous, of the storage type, sorted. Zeros if the caller gave none.
Tensor state_of(const LayerInputs& in, const OptionalTensor& state, const LayerSizes& sizes, int64_t size,
                const PackedLayout& layout, const Types& types) {
  if (!state)
    return in.single_step
               ? zeros(types.storage, {sizes.batch, size})
               : zeros(types.storage, {sizes.num_layers * sizes.directions(), layout.schedule().batch, size});
  Tensor contiguous = ready(*state, types);
  return layout.sorted() ? layout.gather(contiguous) : contiguous;
}

// ---- forward

// What a forward kernel reads, in the storage type, with packed rows. All but the weights are contiguous.
struct ForwardTensors {
  const Tensor &input, &hx, &cx;
  const Tensors& weights;
};

template <class Storage, class Compute>
void run_forward(void (*kernel)(const ForwardCall<Storage, Compute>*, int64_t), const LayerInputs& in,
                 const LayerSizes& sizes, const Schedule& schedule, const ForwardTensors& tensors,
                 const LayerOutputs& result) {
  const LayerShape shape = shape_of(in, sizes);
  const LayerWeights weights(sizes.weights, tensors.weights);
  const int64_t width = shape.directions * shape.output_size(), last = sizes.num_layers - 1;
  // The outputs of all layers but the last. Two buffers take turns, because only the next layer reads an output.
  OptionalTensor between[2];
  const int64_t stride = std::is_same_v<Storage, BFloat16> ? width + width % 2 : width;  // see ForwardCall
  for (int64_t k = 0; k < std::min<int64_t>(last, 2); ++k)
    between[k] = stride == width ? empty(tensors.input.scalar_type(), {schedule.total, stride})
                                 : zeros(tensors.input.scalar_type(), {schedule.total, stride});
  const int threads = usable_threads();
  std::vector<ForwardCall<Storage, Compute>> layers(sizes.num_layers);
  for (int64_t k = 0; k <= last; ++k) {
    ForwardCall<Storage, Compute>& call = layers[k];
    call.shape = shape;
    call.schedule = &schedule;
    call.threads = threads;
    if (k > 0) call.shape.input_size = width;
    call.input = k > 0 ? layers[k - 1].output : read<Storage>(tensors.input);
    call.input_stride = k > 0 ? stride : tensors.input.size(tensors.input.dim() - 1);
    call.output = write<Storage>(k < last ? *between[k % 2] : result.output);
    call.output_stride = k < last ? stride : width;
    for (int64_t d = 0; d < shape.directions; ++d) {
      ForwardDirection<Storage, Compute>& direction = call.direction[d];
      const int64_t of_stack = k * shape.directions + d, state_row = of_stack * schedule.batch;
      direction.weights = weights_of(weights, of_stack);
      direction.hx = read<Storage>(tensors.hx, state_row * shape.output_size());
      // The output of a single step is its h_n.
      direction.h_n = in.single_step ? nullptr : write<Storage>(result.h_n, state_row * shape.output_size());
      if (has_c(in.cell)) {
        direction.cx = read<Storage>(tensors.cx, state_row * shape.hidden_size);
        direction.c_n = write<Storage>(result.c_n, state_row * shape.hidden_size);
      }
      const int64_t units = of_stack * sizes.rows * shape.hidden_size;
      if (result.gates) direction.gates = write<Storage>(*result.gates, saved_planes(in.cell) * units);
      if (result.c) direction.cells = write<Compute>(*result.c, units);
    }
  }
  kernel(layers.data(), sizes.num_layers);
}

LayerOutputs new_outputs(const LayerInputs& in, const LayerSizes& sizes, const PackedLayout& layout, const Types& types,
                         bool save) {
  const Schedule schedule = layout.schedule();
  const int64_t width = sizes.directions() * sizes.output_size();
  const auto new_state = [&](int64_t size) {
    return in.single_step ? empty(types.storage, {sizes.batch, size})
                          : empty(types.storage, {sizes.num_layers * sizes.directions(), schedule.batch, size});
  };
  const auto new_output = [&] {
    return in.rows.batch_sizes || layout.sorted() ? empty(types.storage, {schedule.total, width})
                                                  : empty(types.storage, {sizes.steps, sizes.batch, width});
  };
  Tensor h_n = new_state(sizes.output_size());
  LayerOutputs result{in.single_step ? h_n : new_output(), h_n, has_c(in.cell) ? new_state(sizes.hidden_size) : h_n,
                      std::nullopt, std::nullopt};
  if (!save) return result;
  // The shape must not depend on the values of lengths. So a batch with lengths has rows that no kernel writes.
  const auto new_saved = [&](ScalarType type, int64_t planes) {
    return layout.sorted() ? zeros(type, {sizes.directions(), sizes.rows, planes * sizes.hidden_size})
                           : empty(type, {sizes.directions(), sizes.rows, planes * sizes.hidden_size});
  };
  if (saved_planes(in.cell) > 0) result.gates = new_saved(types.storage, saved_planes(in.cell));
  if (has_c(in.cell)) result.c = new_saved(types.compute, 1);
  return result;
}

LayerOutputs forward_layers(const LayerInputs& in, int64_t num_layers, bool save) {
  const LayerSizes sizes = check_layer(in, num_layers);
  const Kernels& kernel = kernels();
  const Types types = types_of(in.input, kernel.forward_bf16 != nullptr);
  const bool with_c = has_c(in.cell);
  const PackedLayout layout(sizes, in.rows);
  const Schedule schedule = layout.schedule();

  Tensor x = ready(in.input, types);
  if (layout.sorted()) x = layout.pack(x);
  const Tensor h = state_of(in, in.hx, sizes, sizes.output_size(), layout, types);
  const Tensor c = with_c ? state_of(in, in.cx, sizes, sizes.hidden_size, layout, types) : h;
  LayerOutputs result = new_outputs(in, sizes, layout, types, save);

  if (schedule.total == 0) {  // no row: the states pass through
    torch::stable::copy_(result.h_n, h);
    if (with_c) torch::stable::copy_(result.c_n, c);
  } else if (types.storage == ScalarType::BFloat16) {
    // dpbf16ps reads pairs: an odd width gets a column of zeros.
    if (sizes.input_size % 2) x = torch::stable::pad(x, {0, 1}, "constant", 0.0);
    run_forward(kernel.forward_bf16, in, sizes, schedule, {x, h, c, in.weights}, result);
  } else if (types.storage == ScalarType::Double) {
    run_forward(kernel.forward_f64, in, sizes, schedule, {x, h, c, in.weights}, result);
  } else {
    const Tensors copies = types.converts() ? converted(in.weights, types.storage) : Tensors();
    run_forward(kernel.forward_f32, in, sizes, schedule, {x, h, c, types.converts() ? copies : in.weights}, result);
  }
  if (layout.sorted()) {
    result.output = layout.unpack(result.output);
    const auto scattered = [&](const Tensor& state, const OptionalTensor& initial) {
      return layout.scatter(state, initial ? OptionalTensor(ready(*initial, types)) : OptionalTensor());
    };
    result.h_n = scattered(result.h_n, in.hx);
    if (with_c) result.c_n = scattered(result.c_n, in.cx);
  }
  if (types.converts()) {
    result.h_n = torch::stable::to(result.h_n, types.tensors);
    result.output = in.single_step ? result.h_n : torch::stable::to(result.output, types.tensors);
    if (with_c) result.c_n = torch::stable::to(result.c_n, types.tensors);
    if (result.gates) result.gates = torch::stable::to(*result.gates, types.tensors);
  }
  return result;
}

// ---- backward

// What a backward kernel reads, in the storage type (c: in the compute type), with packed rows. All but the weights are
// contiguous.
struct BackwardTensors {
  Tensor input, hx, cx;
  OptionalTensor output, grad_output, grad_h_n, grad_c_n, gates, c;
  Tensors weights;
};

template <class Storage, class Compute>
void run_backward(void (*kernel)(const BackwardCall<Storage, Compute>&), const LayerInputs& in, const LayerSizes& sizes,
                  const Schedule& schedule, const BackwardTensors& tensors, Needs needs, const LayerGradients& result) {
  BackwardCall<Storage, Compute> call{};
  call.shape = shape_of(in, sizes);
  call.schedule = &schedule;
  call.threads = usable_threads();
  call.input = read<Storage>(tensors.input);
  call.output = tensors.output ? read<Storage>(*tensors.output) : nullptr;
  call.grad_output = tensors.grad_output ? read<Storage>(*tensors.grad_output) : nullptr;
  call.grad_input = needs.input ? write<Storage>(result.input) : nullptr;
  const LayerWeights weights(sizes.weights, tensors.weights), grads(sizes.weights, result.weights);
  for (int64_t d = 0; d < sizes.directions(); ++d) {
    BackwardDirection<Storage, Compute>& direction = call.direction[d];
    const int64_t at_h = d * schedule.batch * sizes.output_size(), at_c = d * schedule.batch * sizes.hidden_size;
    const int64_t units = d * sizes.rows * sizes.hidden_size;
    direction.weights = weights_of(weights, d);
    direction.hx = read<Storage>(tensors.hx, at_h);
    direction.grad_hx = needs.states ? write<Storage>(result.hx, at_h) : nullptr;
    direction.grad_h_n = tensors.grad_h_n ? read<Storage>(*tensors.grad_h_n, at_h) : nullptr;
    if (tensors.gates) direction.gates = read<Storage>(*tensors.gates, saved_planes(in.cell) * units);
    if (has_c(in.cell)) {
      direction.cx = read<Storage>(tensors.cx, at_c);
      direction.grad_cx = needs.states ? write<Storage>(result.cx, at_c) : nullptr;
      direction.grad_c_n = tensors.grad_c_n ? read<Storage>(*tensors.grad_c_n, at_c) : nullptr;
      direction.cells = read<Compute>(*tensors.c, units);
    }
    if (!needs.weights) continue;
    direction.grad_weight_ih = write<Storage>(grads.weight_ih(d));
    direction.grad_weight_hh = write<Storage>(grads.weight_hh(d));
    if (grads.has_biases()) {
      direction.grad_bias_ih = write<Storage>(grads.bias_ih(d));
      direction.grad_bias_hh = write<Storage>(grads.bias_hh(d));
    }
    if (grads.is_projected()) direction.grad_weight_hr = write<Storage>(grads.weight_hr(d));
  }
  kernel(call);
}

// Without a row, the gradients of the states pass through.
void pass_gradients(bool with_c, const BackwardTensors& tensors, LayerGradients& result) {
  const auto pass = [&](Tensor& to, const OptionalTensor& from) {
    from ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
  };
  pass(result.hx, tensors.grad_h_n);
  if (with_c) pass(result.cx, tensors.grad_c_n);
}

}  // namespace

LayerOutputs forward_layer(const LayerInputs& in, bool save) { return forward_layers(in, 1, save); }
LayerOutputs forward_stack(const LayerInputs& in, int64_t num_layers) { return forward_layers(in, num_layers, false); }

LayerGradients backward_layer(const LayerInputs& in, const OutputGradients& grads, const Saved& saved, Needs needs) {
  const LayerSizes sizes = check_layer(in);
  const Kernels& kernel = kernels();
  const Types types = types_of(in.input, kernel.backward_bf16 != nullptr);
  const ScalarType storage = types.storage;
  const bool with_c = has_c(in.cell);
  check_backward(in, sizes, grads, saved, types.compute);
  const PackedLayout layout(sizes, in.rows);
  const Schedule schedule = layout.schedule();

  const auto in_rows = [&](const Tensor& tensor) {
    Tensor contiguous = ready(tensor, types);
    return layout.sorted() ? layout.pack(contiguous) : contiguous;
  };
  const auto in_order = [&](const OptionalTensor& tensor) {
    return tensor ? state_of(in, tensor, sizes, 0, layout, types) : OptionalTensor();
  };
  const Tensor hx = state_of(in, in.hx, sizes, sizes.output_size(), layout, types);
  const BackwardTensors tensors{
      in_rows(in.input),
      hx,
      with_c ? state_of(in, in.cx, sizes, sizes.hidden_size, layout, types) : hx,
      saved.output ? in_rows(*saved.output) : OptionalTensor(),
      grads.output ? in_rows(*grads.output) : OptionalTensor(),
      in_order(grads.h_n),
      in_order(grads.c_n),
      saved.gates && types.converts() ? torch::stable::to(*saved.gates, storage) : saved.gates,
      saved.c,
      types.converts() ? converted(in.weights, storage) : in.weights};

  Tensor grad_input = needs.input ? empty_like(storage, tensors.input) : empty(storage, {0});
  Tensor grad_hx = needs.states ? empty_like(storage, tensors.hx) : empty(storage, {0});
  Tensor grad_cx = !with_c ? grad_hx : needs.states ? empty_like(storage, tensors.cx) : empty(storage, {0});
  LayerGradients result{grad_input, grad_hx, grad_cx, {}};
  result.weights.reserve(tensors.weights.size());
  for (const Tensor& weight : tensors.weights) {
    result.weights.push_back(needs.weights ? empty_like(storage, weight) : empty(storage, {0}));
    if (schedule.total == 0) torch::stable::zero_(result.weights.back());  // no row: every sum is zero
  }

  if (schedule.total == 0) {
    if (needs.states) pass_gradients(with_c, tensors, result);
  } else if (storage == ScalarType::BFloat16) {
    run_backward(kernel.backward_bf16, in, sizes, schedule, tensors, needs, result);
  } else if (storage == ScalarType::Double) {
    run_backward(kernel.backward_f64, in, sizes, schedule, tensors, needs, result);
  } else {
    run_backward(kernel.backward_f32, in, sizes, schedule, tensors, needs, result);
  }
  if (layout.sorted()) {
    const auto scattered = [&](const Tensor& grad, const OptionalTensor& given) {
      return layout.scatter(grad, given ? OptionalTensor(ready(*given, types)) : OptionalTensor());
    };
    if (needs.input) result.input = layout.unpack(result.input);
    if (needs.states) result.hx = scattered(result.hx, grads.h_n);
    if (needs.states && with_c) result.cx = scattered(result.cx, grads.c_n);
  }
  if (types.converts()) {
    result.input = torch::stable::to(result.input, types.tensors);
    result.hx = torch::stable::to(result.hx, types.tensors);
    if (with_c) result.cx = torch::stable::to(result.cx, types.tensors);
    result.weights = converted(result.weights, types.tensors);
  }
  return result;
}

}  // namespace rnnfast
