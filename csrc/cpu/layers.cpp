// One layer on the CPU: check, lay out rows, allocate, call the kernels of the chosen instruction set.
//
// 16-bit tensors: bfloat16 is multiplied as such where the machine can (dpbf16ps), with sums and c in float32;
// everything else is computed in float32 from converted copies, and results are rounded once at the end.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "layer.h"
#include "layers.h"
#include "rows.h"

namespace rnnfast {
namespace {

using torch::headeronly::ScalarType;

bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// The dtype of sums, activations and c.
ScalarType compute_type(const Tensor& input) {
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(is_half(type) || type == ScalarType::Float || type == ScalarType::Double,
                  "input: expected float32, float64, bfloat16 or float16, got ", toString(type));
  return is_half(type) ? ScalarType::Float : type;
}

// Contiguous, in the given dtype; the tensor itself where it already is.
Tensor ready(const Tensor& tensor, ScalarType type) {
  const Tensor converted = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

Tensors converted(const Tensors& tensors, ScalarType type) {
  Tensors result;
  for (const Tensor& tensor : tensors)
    result.push_back(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
  return result;
}

Tensor restored(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

LayerShape shape_of(Cell cell, bool relu, const LayerSizes& sizes) {
  return {cell, relu, sizes.input_size, sizes.hidden_size, sizes.proj_size, sizes.directions};
}

Weight weight_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.dim() == 2 ? tensor.stride(1) : 0};
}

DirectionWeights weights_of(const LayerSizes& sizes, const Tensors& weights, int64_t d) {
  const Tensor* const own = weights.data() + d * sizes.weights_per_direction;
  DirectionWeights result;
  result.ih = weight_of(own[0]);
  result.hh = weight_of(own[1]);
  if (sizes.has_biases) {
    result.bias_ih = weight_of(own[2]);
    result.bias_hh = weight_of(own[3]);
  }
  if (sizes.proj_size) result.hr = weight_of(own[sizes.weights_per_direction - 1]);
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

// All tensors contiguous, of storage type E; rows packed.
template <class E, class C>
void run_forward(void (*kernel)(const ForwardCall<E, C>&), const LayerShape& shape, const LayerSizes& sizes,
                 const Schedule& schedule, const Tensor& input, const Tensor& hx, const Tensor* cx,
                 const Tensors& weights, Forward& result) {
  ForwardCall<E, C> call{};
  call.shape = shape;
  call.schedule = &schedule;
  call.threads = usable_threads();
  call.input = read<E>(input);
  call.input_stride = input.size(input.dim() - 1);
  call.output = write<E>(result.output);
  for (int64_t d = 0; d < sizes.directions; ++d) {
    ForwardDirection<E, C>& direction = call.direction[d];
    const int64_t states = d * schedule.batch * shape.output_size(), cells = d * schedule.batch * shape.hidden_size;
    direction.weights = weights_of(sizes, weights, d);
    direction.hx = read<E>(hx, states);
    direction.h_n = write<E>(result.h_n, states);
    if (cx) {
      direction.cx = read<E>(*cx, cells);
      direction.c_n = write<E>(result.c_n, cells);
    }
    if (!result.saved.empty()) {
      direction.gates = write<E>(result.saved[0], d * sizes.rows * saved_planes(shape.cell) * shape.hidden_size);
      if (cx) direction.cells = write<C>(result.saved[1], d * sizes.rows * shape.hidden_size);
    }
  }
  kernel(call);
}

}  // namespace

Forward forward_layer(Cell cell, bool relu, const Tensor& input, const Tensor& hx, const Tensor* cx,
                      const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      bool save) {
  const LayerSizes sizes = check_layer(cell, input, hx, cx, weights, batch_sizes, lengths);
  const ScalarType type = input.scalar_type(), wide = compute_type(input);
  const Kernels& kernel = kernels();
  const bool native_bf16 = type == ScalarType::BFloat16 && kernel.forward_bf16;
  const ScalarType storage = native_bf16 ? type : wide;
  const Rows rows(sizes, batch_sizes, lengths);
  const Schedule schedule = rows.schedule();

  Tensor x = ready(input, storage), h = ready(hx, storage);
  if (rows.sorted()) {
    x = rows.pack(x);
    h = rows.gather(h);
  }
  // dpbf16ps reads pairs: an odd width gets a zero column.
  if (native_bf16 && sizes.input_size % 2) x = torch::stable::pad(x, {0, 1}, "constant", 0.0);

  Forward result;
  const int64_t width = sizes.directions * sizes.output_size();
  const bool flat = batch_sizes || rows.sorted();
  result.output = flat ? torch::stable::new_empty(x, {schedule.total, width})
                       : torch::stable::new_empty(x, {sizes.steps, sizes.batch, width});
  result.h_n = torch::stable::new_empty(h, {sizes.directions, schedule.batch, sizes.output_size()});
  Tensor c;
  if (cx) {
    c = ready(*cx, storage);
    if (rows.sorted()) c = rows.gather(c);
    result.c_n = torch::stable::new_empty(c, {sizes.directions, schedule.batch, sizes.hidden_size});
  }
  if (save && cell != Cell::kRnn) {
    const auto add_saved = [&](int64_t width, ScalarType dtype) {
      const std::vector<int64_t> size = {sizes.directions, sizes.rows, width};
      // With lengths fewer rows are written than the shape (which must not depend on their values) has.
      result.saved.push_back(rows.sorted() ? torch::stable::new_zeros(x, size, dtype)
                                           : torch::stable::new_empty(x, size, dtype));
    };
    add_saved(saved_planes(cell) * sizes.hidden_size, storage);
    if (cx) add_saved(sizes.hidden_size, wide);
  }

  const LayerShape shape = shape_of(cell, relu, sizes);
  if (schedule.total == 0) {  // no step: the states pass through
    torch::stable::copy_(result.h_n, h);
    if (cx) torch::stable::copy_(result.c_n, c);
  } else if (native_bf16) {
    run_forward<BFloat16, float>(kernel.forward_bf16, shape, sizes, schedule, x, h, cx ? &c : nullptr, weights, result);
  } else if (storage == ScalarType::Double) {
    run_forward<double, double>(kernel.forward_f64, shape, sizes, schedule, x, h, cx ? &c : nullptr, weights, result);
  } else {
    run_forward<float, float>(kernel.forward_f32, shape, sizes, schedule, x, h, cx ? &c : nullptr,
                              converted(weights, storage), result);
  }
  if (rows.sorted()) {
    result.output = rows.unpack(result.output);
    result.h_n = rows.scatter(result.h_n, ready(hx, storage));
    if (cx) result.c_n = rows.scatter(result.c_n, ready(*cx, storage));
  }
  result.output = restored(result.output, type);
  result.h_n = restored(result.h_n, type);
  if (cx) result.c_n = restored(result.c_n, type);
  if (!result.saved.empty()) result.saved[0] = restored(result.saved[0], type);
  return result;
}

namespace {

// Incoming gradients and what forward knew; all contiguous, of type T, rows packed.
struct BackwardTensors {
  Tensor input, hx, cx, output;
  OptionalTensor grad_output, grad_h_n, grad_c_n;
  Tensors weights, saved;
};

template <class E, class C>
void run_backward(void (*kernel)(const BackwardCall<E, C>&), const LayerShape& shape, const LayerSizes& sizes,
                  const Schedule& schedule, const BackwardTensors& tensors, bool need_grad_input,
                  bool need_grad_weights, const Backward& result) {
  BackwardCall<E, C> call{};
  call.shape = shape;
  call.schedule = &schedule;
  call.threads = usable_threads();
  call.input = read<E>(tensors.input);
  call.output = read<E>(tensors.output);
  call.grad_output = tensors.grad_output ? read<E>(*tensors.grad_output) : nullptr;
  call.grad_input = need_grad_input ? write<E>(result.input) : nullptr;
  for (int64_t d = 0; d < sizes.directions; ++d) {
    BackwardDirection<E, C>& direction = call.direction[d];
    const int64_t states = d * schedule.batch * shape.output_size(), cells = d * schedule.batch * shape.hidden_size;
    direction.weights = weights_of(sizes, tensors.weights, d);
    direction.hx = read<E>(tensors.hx, states);
    direction.grad_hx = write<E>(result.hx, states);
    direction.grad_h_n = tensors.grad_h_n ? read<E>(*tensors.grad_h_n, states) : nullptr;
    if (shape.cell == Cell::kLstm) {
      direction.cx = read<E>(tensors.cx, cells);
      direction.grad_cx = write<E>(result.cx, cells);
      direction.grad_c_n = tensors.grad_c_n ? read<E>(*tensors.grad_c_n, cells) : nullptr;
      direction.cells = read<C>(tensors.saved[1], d * sizes.rows * shape.hidden_size);
    }
    if (shape.cell != Cell::kRnn)
      direction.gates = read<E>(tensors.saved[0], d * sizes.rows * saved_planes(shape.cell) * shape.hidden_size);
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

void check_backward(Cell cell, const LayerSizes& sizes, const Tensor& input, const Tensor& hx, const Tensor* cx,
                    const Tensor& output, const Tensors& saved, const OptionalTensor& grad_output,
                    const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, ScalarType wide) {
  const int64_t width = sizes.directions * sizes.output_size();
  const auto check_output = [&](const Tensor& tensor, Name name) {
    check_like(tensor, input, name);
    input.dim() == 2 ? check_shape(tensor, {sizes.rows, width}, name)
                     : check_shape(tensor, {sizes.steps, sizes.batch, width}, name);
  };
  check_output(output, {"output"});
  if (grad_output) check_output(*grad_output, {"grad_output"});
  const auto check_state = [&](const OptionalTensor& tensor, const Tensor& state, Name name) {
    if (!tensor) return;
    check_like(*tensor, input, name);
    check_shape(*tensor, {state.size(0), state.size(1), state.size(2)}, name);
  };
  check_state(grad_h_n, hx, {"grad_h_n"});
  if (cx) check_state(grad_c_n, *cx, {"grad_c_n"});
  const size_t expected = cell == Cell::kRnn ? 0 : cell == Cell::kGru ? 1 : 2;
  STD_TORCH_CHECK(saved.size() == expected, "saved: expected ", expected, " tensors, got ", saved.size());
  for (size_t i = 0; i < expected; ++i) {
    const Name name{"saved", int64_t(i)};
    check_shape(saved[i], {sizes.directions, sizes.rows, (i ? 1 : saved_planes(cell)) * sizes.hidden_size}, name);
    STD_TORCH_CHECK(
        saved[i].is_cpu() && saved[i].is_contiguous() && saved[i].scalar_type() == (i ? wide : input.scalar_type()),
        name.str(), ": expected what forward returned");
  }
}

}  // namespace

Backward backward_layer(Cell cell, bool relu, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& hx, const Tensor* cx,
                        const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                        const Tensor& output, const Tensors& saved, bool need_grad_input, bool need_grad_weights) {
  const LayerSizes sizes = check_layer(cell, input, hx, cx, weights, batch_sizes, lengths);
  const ScalarType type = input.scalar_type(), wide = compute_type(input);
  check_backward(cell, sizes, input, hx, cx, output, saved, grad_output, grad_h_n, grad_c_n, wide);
  const bool native_bf16 = type == ScalarType::BFloat16 && kernels().backward_bf16;
  const ScalarType storage = native_bf16 ? type : wide;
  const Rows rows(sizes, batch_sizes, lengths);
  const Schedule schedule = rows.schedule();

  const auto in_rows = [&](const Tensor& tensor) {
    const Tensor contiguous = ready(tensor, storage);
    return rows.sorted() ? rows.pack(contiguous) : contiguous;
  };
  const auto in_order = [&](const Tensor& tensor) {
    const Tensor contiguous = ready(tensor, storage);
    return rows.sorted() ? rows.gather(contiguous) : contiguous;
  };
  const auto if_given = [](const OptionalTensor& tensor, const auto& prepare) {
    return tensor ? OptionalTensor(prepare(*tensor)) : OptionalTensor();
  };
  BackwardTensors tensors{in_rows(input),
                          in_order(hx),
                          cx ? in_order(*cx) : Tensor(),
                          in_rows(output),
                          if_given(grad_output, in_rows),
                          if_given(grad_h_n, in_order),
                          if_given(grad_c_n, in_order),
                          converted(weights, storage),
                          saved};
  if (!saved.empty()) tensors.saved[0] = restored(saved[0], storage);

  Backward result;
  result.input = need_grad_input ? torch::stable::empty_like(tensors.input) : torch::stable::new_empty(input, {0});
  result.hx = torch::stable::empty_like(tensors.hx);
  if (cx) result.cx = torch::stable::empty_like(tensors.cx);
  for (const Tensor& weight : tensors.weights) {
    std::vector<int64_t> size = {0};
    if (need_grad_weights) size.assign(weight.sizes().begin(), weight.sizes().end());
    // A batch without a step leaves every sum at zero.
    result.weights.push_back(schedule.total == 0 ? torch::stable::new_zeros(weight, size)
                                                 : torch::stable::new_empty(weight, size));
  }

  const LayerShape shape = shape_of(cell, relu, sizes);
  if (schedule.total == 0) {
    tensors.grad_h_n ? torch::stable::copy_(result.hx, *tensors.grad_h_n) : torch::stable::zero_(result.hx);
    if (cx) tensors.grad_c_n ? torch::stable::copy_(result.cx, *tensors.grad_c_n) : torch::stable::zero_(result.cx);
  } else if (native_bf16) {
    run_backward(kernels().backward_bf16, shape, sizes, schedule, tensors, need_grad_input, need_grad_weights, result);
  } else if (storage == ScalarType::Double) {
    run_backward(kernels().backward_f64, shape, sizes, schedule, tensors, need_grad_input, need_grad_weights, result);
  } else {
    run_backward(kernels().backward_f32, shape, sizes, schedule, tensors, need_grad_input, need_grad_weights, result);
  }
  if (rows.sorted()) {
    const auto given = [&](const OptionalTensor& grad) {
      return grad ? OptionalTensor(ready(*grad, storage)) : OptionalTensor();
    };
    if (need_grad_input) result.input = rows.unpack(result.input);
    result.hx = rows.scatter(result.hx, given(grad_h_n));
    if (cx) result.cx = rows.scatter(result.cx, given(grad_c_n));
  }
  result.input = restored(result.input, type);
  result.hx = restored(result.hx, type);
  if (cx) result.cx = restored(result.cx, type);
  result.weights = converted(result.weights, type);
  return result;
}

}  // namespace rnnfast
