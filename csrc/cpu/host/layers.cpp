// Layers on the CPU: check, lay out rows, allocate, call the kernels of the chosen instruction set.
//
// 16-bit tensors: bfloat16 is multiplied as such where the machine can (dpbf16ps), with sums and c in float32;
// everything else is computed in float32 from converted copies, and results are rounded once at the end.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/layers.h"
#include "cpu/host/rows.h"
#include "cpu/host/tensors.h"
#include "cpu/layer.h"

namespace rnnfast {
namespace {

using torch::headeronly::ScalarType;

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// The dtype of sums, activations and c.
ScalarType compute_type(ScalarType type) {
  RNNFAST_REQUIRE(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                  "input: expected float32, float64, bfloat16 or float16, got ", toString(type));
  return is_half(type) ? ScalarType::Float : type;
}

// Contiguous, in the given dtype (`same`: it has it already); the tensor itself where it can be.
Tensor ready(const Tensor& tensor, ScalarType type, bool same) {
  const Tensor converted = same ? tensor : torch::stable::to(tensor, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

Tensors converted(const Tensors& tensors, ScalarType type) {
  Tensors result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::to(tensor, type));
  return result;
}

LayerShape shape_of(Cell cell, bool relu, const LayerSizes& sizes) {
  return {cell, relu, sizes.input_size, sizes.hidden_size, sizes.proj_size, sizes.directions};
}

Weight weight_of(const Tensor& tensor, bool matrix) {
  int64_t* strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  return {tensor.const_data_ptr(), strides[0], matrix ? strides[1] : 0};
}

// Of one direction of one layer, in the order of the states.
DirectionWeights weights_of(const LayerSizes& sizes, const Tensors& weights, int64_t place) {
  const Tensor* const own = weights.data() + place * sizes.weights_per_direction;
  DirectionWeights result;
  result.ih = weight_of(own[0], true);
  result.hh = weight_of(own[1], true);
  if (sizes.has_biases) {
    result.bias_ih = weight_of(own[2], false);
    result.bias_hh = weight_of(own[3], false);
  }
  if (sizes.proj_size) result.hr = weight_of(own[sizes.weights_per_direction - 1], true);
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

// hx and cx contiguous, of the given dtype, in the order of the rows.
Tensor state_of(const LayerInputs& in, const OptionalTensor& state, const LayerSizes& sizes, int64_t size,
                const Rows& rows, ScalarType type, bool same) {
  if (!state)
    return in.step ? zeros(type, {sizes.batch, size})
                   : zeros(type, {sizes.num_layers * sizes.directions, rows.schedule().batch, size});
  Tensor contiguous = ready(*state, type, same);
  return rows.sorted() ? rows.gather(contiguous) : contiguous;
}

// All tensors contiguous, of storage type E; rows packed. A step's only output is its state.
template <class E, class C>
void run_forward(void (*kernel)(const ForwardCall<E, C>*, int64_t), const LayerShape& shape, const LayerSizes& sizes,
                 const Schedule& schedule, const Tensor& input, const Tensor& hx, const Tensor* cx,
                 const Tensors& weights, bool step, Forward& result) {
  const int64_t width = sizes.directions * sizes.output_size(), last = sizes.num_layers - 1;
  // What a layer in between leaves for the next; of two in turn, as none is read by the layer after that.
  OptionalTensor between[2];
  const int64_t stride = std::is_same_v<E, BFloat16> ? width + width % 2 : width;  // see ForwardCall::input_stride
  for (int64_t k = 0; k < std::min<int64_t>(last, 2); ++k)
    between[k] = stride == width ? empty(input.scalar_type(), {schedule.total, stride})
                                 : zeros(input.scalar_type(), {schedule.total, stride});
  const int threads = usable_threads();
  std::vector<ForwardCall<E, C>> layers(sizes.num_layers);
  for (int64_t k = 0; k <= last; ++k) {
    ForwardCall<E, C>& call = layers[k];
    call.shape = shape;
    call.schedule = &schedule;
    call.threads = threads;
    if (k > 0) call.shape.input_size = width;
    call.input = k > 0 ? layers[k - 1].output : read<E>(input);
    call.input_stride = k > 0 ? stride : input.size(input.dim() - 1);
    call.output = write<E>(k < last ? *between[k % 2] : result.output);
    call.output_stride = k < last ? stride : width;
    for (int64_t d = 0; d < sizes.directions; ++d) {
      ForwardDirection<E, C>& direction = call.direction[d];
      const int64_t place = k * sizes.directions + d, rows = place * schedule.batch;
      direction.weights = weights_of(sizes, weights, place);
      direction.hx = read<E>(hx, rows * shape.output_size());
      direction.h_n = step ? nullptr : write<E>(result.h_n, rows * shape.output_size());
      if (cx) {
        direction.cx = read<E>(*cx, rows * shape.hidden_size);
        direction.c_n = write<E>(result.c_n, rows * shape.hidden_size);
      }
      const int64_t units = place * sizes.rows * shape.hidden_size;
      if (result.gates) direction.gates = write<E>(*result.gates, saved_planes(shape.cell) * units);
      if (result.cells) direction.cells = write<C>(*result.cells, units);
    }
  }
  kernel(layers.data(), sizes.num_layers);
}

Forward forward_layers(const LayerInputs& in, int64_t num_layers, bool save) {
  const LayerSizes sizes = check_layer(in, num_layers);
  const ScalarType type = in.input.scalar_type(), wide = compute_type(type);
  const Kernels& kernel = kernels();
  const bool native_bf16 = type == ScalarType::BFloat16 && kernel.forward_bf16;
  const ScalarType storage = native_bf16 ? type : wide;
  const bool same = type == storage, lstm = in.cell == Cell::kLstm;
  const Rows rows(sizes, in.batch_sizes, in.lengths);
  const Schedule schedule = rows.schedule();

  Tensor x = ready(in.input, storage, same);
  if (rows.sorted()) x = rows.pack(x);
  const Tensor h = state_of(in, in.hx, sizes, sizes.output_size(), rows, storage, same);
  const Tensor c = lstm ? state_of(in, in.cx, sizes, sizes.hidden_size, rows, storage, same) : h;

  const int64_t width = sizes.directions * sizes.output_size();
  const auto new_state = [&](int64_t size) {
    return in.step ? empty(storage, {sizes.batch, size})
                   : empty(storage, {num_layers * sizes.directions, schedule.batch, size});
  };
  const auto new_output = [&] {
    return in.batch_sizes || rows.sorted() ? empty(storage, {schedule.total, width})
                                           : empty(storage, {sizes.steps, sizes.batch, width});
  };
  Tensor h_n = new_state(sizes.output_size());
  Forward result{in.step ? h_n : new_output(), h_n, lstm ? new_state(sizes.hidden_size) : h_n, std::nullopt,
                 std::nullopt};
  if (save && in.cell != Cell::kRnn) {
    // With lengths fewer rows are written than the shape (which must not depend on their values) has.
    const auto new_saved = [&](ScalarType dtype, int64_t planes) {
      return rows.sorted() ? zeros(dtype, {sizes.directions, sizes.rows, planes * sizes.hidden_size})
                           : empty(dtype, {sizes.directions, sizes.rows, planes * sizes.hidden_size});
    };
    result.gates = new_saved(storage, saved_planes(in.cell));
    if (lstm) result.cells = new_saved(wide, 1);
  }

  const LayerShape shape = shape_of(in.cell, in.relu, sizes);
  const Tensor* const cx = lstm ? &c : nullptr;
  if (schedule.total == 0) {  // no step: the states pass through
    torch::stable::copy_(result.h_n, h);
    if (lstm) torch::stable::copy_(result.c_n, c);
  } else if (native_bf16) {
    // dpbf16ps reads pairs: an odd width gets a zero column.
    if (sizes.input_size % 2) x = torch::stable::pad(x, {0, 1}, "constant", 0.0);
    run_forward<BFloat16, float>(kernel.forward_bf16, shape, sizes, schedule, x, h, cx, in.weights, in.step, result);
  } else if (storage == ScalarType::Double) {
    run_forward<double, double>(kernel.forward_f64, shape, sizes, schedule, x, h, cx, in.weights, in.step, result);
  } else {
    run_forward<float, float>(kernel.forward_f32, shape, sizes, schedule, x, h, cx,
                              same ? in.weights : converted(in.weights, storage), in.step, result);
  }
  if (rows.sorted()) {
    result.output = rows.unpack(result.output);
    const auto scattered = [&](const Tensor& state, const OptionalTensor& initial) {
      return rows.scatter(state, initial ? OptionalTensor(ready(*initial, storage, same)) : OptionalTensor());
    };
    result.h_n = scattered(result.h_n, in.hx);
    if (lstm) result.c_n = scattered(result.c_n, in.cx);
  }
  if (!same) {
    result.h_n = torch::stable::to(result.h_n, type);
    result.output = in.step ? result.h_n : torch::stable::to(result.output, type);
    if (lstm) result.c_n = torch::stable::to(result.c_n, type);
    if (result.gates) result.gates = torch::stable::to(*result.gates, type);
  }
  return result;
}

// Incoming gradients and what forward knew; all contiguous, of type E (cells: C), rows packed.
struct BackwardTensors {
  Tensor input, hx, cx;
  OptionalTensor output, grad_output, grad_h_n, grad_c_n, gates, cells;
  Tensors weights;
};

template <class E, class C>
void run_backward(void (*kernel)(const BackwardCall<E, C>&), const LayerShape& shape, const LayerSizes& sizes,
                  const Schedule& schedule, const BackwardTensors& tensors, bool need_grad_input, bool need_grad_states,
                  bool need_grad_weights, const Backward& result) {
  BackwardCall<E, C> call{};
  call.shape = shape;
  call.schedule = &schedule;
  call.threads = usable_threads();
  call.input = read<E>(tensors.input);
  call.output = tensors.output ? read<E>(*tensors.output) : nullptr;
  call.grad_output = tensors.grad_output ? read<E>(*tensors.grad_output) : nullptr;
  call.grad_input = need_grad_input ? write<E>(result.input) : nullptr;
  for (int64_t d = 0; d < sizes.directions; ++d) {
    BackwardDirection<E, C>& direction = call.direction[d];
    const int64_t states = d * schedule.batch * shape.output_size(), cells = d * schedule.batch * shape.hidden_size;
    const int64_t units = d * sizes.rows * shape.hidden_size;
    direction.weights = weights_of(sizes, tensors.weights, d);
    direction.hx = read<E>(tensors.hx, states);
    direction.grad_hx = need_grad_states ? write<E>(result.hx, states) : nullptr;
    direction.grad_h_n = tensors.grad_h_n ? read<E>(*tensors.grad_h_n, states) : nullptr;
    if (tensors.gates) direction.gates = read<E>(*tensors.gates, saved_planes(shape.cell) * units);
    if (shape.cell == Cell::kLstm) {
      direction.cx = read<E>(tensors.cx, cells);
      direction.grad_cx = need_grad_states ? write<E>(result.cx, cells) : nullptr;
      direction.grad_c_n = tensors.grad_c_n ? read<E>(*tensors.grad_c_n, cells) : nullptr;
      direction.cells = read<C>(*tensors.cells, units);
    }
    if (!need_grad_weights) continue;
    const Tensor* const own = result.weights.data() + d * sizes.weights_per_direction;
    direction.grad_weight_ih = write<E>(own[0]);
    direction.grad_weight_hh = write<E>(own[1]);
    if (sizes.has_biases) {
      direction.grad_bias_ih = write<E>(own[2]);
      direction.grad_bias_hh = write<E>(own[3]);
    }
    if (sizes.proj_size) direction.grad_weight_hr = write<E>(own[sizes.weights_per_direction - 1]);
  }
  kernel(call);
}

void check_backward(const LayerInputs& in, const LayerSizes& sizes, const Known& known, const Incoming& grads,
                    ScalarType type, ScalarType wide) {
  const Facts x(in.input);
  const int64_t width = sizes.directions * sizes.output_size();
  const auto check_output = [&](const Tensor& tensor, Name name) {
    x.dim == 2 ? check_like(tensor, {sizes.rows, width}, in.input, x, name)
               : check_like(tensor, {sizes.steps, sizes.batch, width}, in.input, x, name);
  };
  const auto check_state = [&](const OptionalTensor& tensor, int64_t size, Name name) {
    if (!tensor) return;
    in.step ? check_like(*tensor, {sizes.batch, size}, in.input, x, name)
            : check_like(*tensor, {sizes.directions, sizes.batch, size}, in.input, x, name);
  };
  if (known.output) check_output(*known.output, {"output"});
  if (grads.output) check_output(*grads.output, {"grad_output"});
  check_state(grads.h_n, sizes.output_size(), {"grad_h_n"});
  check_state(grads.c_n, sizes.hidden_size, {"grad_c_n"});
  const auto check_saved = [&](const OptionalTensor& saved, int64_t planes, ScalarType dtype, Name name) {
    if (!saved) return;
    check_shape(*saved, {sizes.directions, sizes.rows, planes * sizes.hidden_size}, name);
    RNNFAST_REQUIRE(saved->is_cpu() && saved->is_contiguous() && saved->scalar_type() == dtype, name.str(),
                    ": expected what forward returned, in dtype ", toString(dtype));
  };
  check_saved(known.gates, saved_planes(in.cell), type, {"saved_0"});
  check_saved(known.cells, 1, wide, {"saved_1"});
}

}  // namespace

Forward forward_layer(const LayerInputs& in, bool save) { return forward_layers(in, 1, save); }
Forward forward_stack(const LayerInputs& in, int64_t num_layers) { return forward_layers(in, num_layers, false); }

Backward backward_layer(const LayerInputs& in, const Incoming& grads, const Known& known, bool need_grad_input,
                        bool need_grad_states, bool need_grad_weights) {
  const LayerSizes sizes = check_layer(in);
  const ScalarType type = in.input.scalar_type(), wide = compute_type(type);
  const Kernels& kernel = kernels();
  const bool native_bf16 = type == ScalarType::BFloat16 && kernel.backward_bf16;
  const ScalarType storage = native_bf16 ? type : wide;
  const bool same = type == storage, lstm = in.cell == Cell::kLstm;
  check_backward(in, sizes, known, grads, type, wide);
  const Rows rows(sizes, in.batch_sizes, in.lengths);
  const Schedule schedule = rows.schedule();

  const auto in_rows = [&](const Tensor& tensor) {
    Tensor contiguous = ready(tensor, storage, same);
    return rows.sorted() ? rows.pack(contiguous) : contiguous;
  };
  const auto in_order = [&](const OptionalTensor& tensor) {
    return tensor ? state_of(in, tensor, sizes, 0, rows, storage, same) : OptionalTensor();
  };
  const Tensor hx = state_of(in, in.hx, sizes, sizes.output_size(), rows, storage, same);
  const BackwardTensors tensors{in_rows(in.input),
                                hx,
                                lstm ? state_of(in, in.cx, sizes, sizes.hidden_size, rows, storage, same) : hx,
                                known.output ? in_rows(*known.output) : OptionalTensor(),
                                grads.output ? in_rows(*grads.output) : OptionalTensor(),
                                in_order(grads.h_n),
                                in_order(grads.c_n),
                                known.gates && !same ? torch::stable::to(*known.gates, storage) : known.gates,
                                known.cells,
                                same ? in.weights : converted(in.weights, storage)};

  Tensor grad_input = need_grad_input ? empty_like(storage, tensors.input) : empty(storage, {0});
  Tensor grad_hx = need_grad_states ? empty_like(storage, tensors.hx) : empty(storage, {0});
  Tensor grad_cx = !lstm ? grad_hx : need_grad_states ? empty_like(storage, tensors.cx) : empty(storage, {0});
  Backward result{grad_input, grad_hx, grad_cx, {}};
  result.weights.reserve(tensors.weights.size());
  for (const Tensor& weight : tensors.weights) {
    result.weights.push_back(need_grad_weights ? empty_like(storage, weight) : empty(storage, {0}));
    // A batch without a step leaves every sum at zero.
    if (schedule.total == 0) torch::stable::zero_(result.weights.back());
  }

  const LayerShape shape = shape_of(in.cell, in.relu, sizes);
  if (schedule.total == 0) {
    const auto pass = [&](Tensor& to, const OptionalTensor& from) {
      from ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
    };
    if (need_grad_states) pass(result.hx, tensors.grad_h_n);
    if (need_grad_states && lstm) pass(result.cx, tensors.grad_c_n);
  } else if (native_bf16) {
    run_backward(kernel.backward_bf16, shape, sizes, schedule, tensors, need_grad_input, need_grad_states,
                 need_grad_weights, result);
  } else if (storage == ScalarType::Double) {
    run_backward(kernel.backward_f64, shape, sizes, schedule, tensors, need_grad_input, need_grad_states,
                 need_grad_weights, result);
  } else {
    run_backward(kernel.backward_f32, shape, sizes, schedule, tensors, need_grad_input, need_grad_states,
                 need_grad_weights, result);
  }
  if (rows.sorted()) {
    const auto scattered = [&](const Tensor& grad, const OptionalTensor& given) {
      return rows.scatter(grad, given ? OptionalTensor(ready(*given, storage, same)) : OptionalTensor());
    };
    if (need_grad_input) result.input = rows.unpack(result.input);
    if (need_grad_states) result.hx = scattered(result.hx, grads.h_n);
    if (need_grad_states && lstm) result.cx = scattered(result.cx, grads.c_n);
  }
  if (!same) {
    result.input = torch::stable::to(result.input, type);
    result.hx = torch::stable::to(result.hx, type);
    if (lstm) result.cx = torch::stable::to(result.cx, type);
    result.weights = converted(result.weights, type);
  }
  return result;
}

}  // namespace rnnfast
