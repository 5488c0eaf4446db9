// Backward of a layer on the GPU: the recurrence in reverse, then the gradients of x and of the weights as large
// products over all rows at once. Every sum has a fixed order.
#include "cuda/host/host.h"

#include "cuda/device/around.h"

namespace rnnfast {
namespace cuda {
namespace {

void check_backward(const LayerInputs& in, const Call& call, const Incoming& grads, const Known& known) {
  const LayerSizes& sizes = call.sizes;
  const Facts x(in.input);
  const int64_t D = sizes.directions, width = D * sizes.output_size();
  const auto check_output = [&](const OptionalTensor& tensor, Name name) {
    if (!tensor) return;
    x.dim == 2 ? check_like(*tensor, {sizes.rows, width}, in.input, x, name)
               : check_like(*tensor, {sizes.steps, sizes.batch, width}, in.input, x, name);
  };
  const auto check_state = [&](const OptionalTensor& tensor, int64_t size, Name name) {
    if (!tensor) return;
    in.step ? check_like(*tensor, {sizes.batch, size}, in.input, x, name)
            : check_like(*tensor, {D, sizes.batch, size}, in.input, x, name);
  };
  check_output(known.output, {"output"});
  check_output(grads.output, {"grad_output"});
  check_state(grads.h_n, sizes.output_size(), {"grad_h_n"});
  check_state(grads.c_n, sizes.hidden_size, {"grad_c_n"});
  const auto check_saved = [&](const OptionalTensor& saved, int64_t planes, ScalarType dtype, Name name) {
    if (!saved) return;
    check_shape(*saved, {D, sizes.rows, planes * sizes.hidden_size}, name);
    const Facts facts(*saved);
    RNNFAST_REQUIRE(facts.device_type == x.device_type && facts.device_index == x.device_index &&
                        saved->is_contiguous() && saved->scalar_type() == dtype,
                    name.str(), ": expected what forward returned, in dtype ", toString(dtype));
  };
  check_saved(known.gates, saved_planes(in.cell), call.type, {"saved_0"});
  check_saved(known.cells, 1, call.wide, {"saved_1"});
}

void run_resident(Call& call, const LayerInputs& in, BackwardLayer<void> layer, Tier tier) {
  call.ready_weights(in, layer.weights);
  // The states' gradients are the kernel's last step anyway; it writes them somewhere.
  const LayerSizes& sizes = call.sizes;
  std::optional<Tensor> grad_hx, grad_cx;
  if (!layer.grad_hx) {
    grad_hx = call.new_tensor({sizes.directions, sizes.batch, sizes.output_size()});
    grad_cx = call.new_tensor({sizes.directions, sizes.batch, sizes.hidden_size});
    layer.grad_hx = write(grad_hx);
    layer.grad_cx = write(grad_cx);
  }
  const std::optional<Tensor> exchange = call.exchange(tier, layer, true);
  check(with_arithmetic(call.arithmetic,
                        [&]<Arithmetic kArithmetic>() {
                          return run_resident_backward<kArithmetic>(tier, layer, write(exchange), call.stream);
                        }),
        std::string("backward, tier ") + kTierNames[int(tier)]);
}

void run_step(Call& call, const LayerInputs& in, const BackwardLayer<void>& layer, bool large) {
  StepBackward<void> step{};
  static_cast<BackwardLayer<void>&>(step) = layer;
  const LayerSizes& sizes = call.sizes;
  const int64_t H = sizes.hidden_size;
  for (int64_t d = 0; d < sizes.directions; ++d) {
    const Tensor* const weights = in.weights.data() + d * sizes.weights_per_direction;
    step.recurrent[d] = call.aligned_transpose(weights[1]);
    if (sizes.proj_size) step.projection[d] = call.aligned_transpose(weights[sizes.weights_per_direction - 1]);
  }
  std::optional<Tensor> carry;
  if (in.cell != Cell::kRnn) carry = empty(call.place, call.wide, {sizes.directions, sizes.batch, H});
  step.carry = write<float>(carry);
  // GRU's planes start one H into a row.
  step.aligned = call.rows_aligned(layer.grad_gates, H);
  step.aligned_projected = call.rows_aligned(layer.grad_projected, sizes.output_size());
  check(with_arithmetic(
            call.arithmetic,
            [&]<Arithmetic kArithmetic>() { return run_step_backward<kArithmetic>(step, large, call.stream); }),
        "backward, tier step");
}

// The gate gradients of a direction as matrices [N, G*H] of stride planes * H. GRU's planes are n_x r z n_h.
struct GateGrads {
  const Tensor& all;  // [D, N, planes * H]
  const Call& call;
  Cell cell;

  int64_t width() const { return grad_planes(cell) * call.sizes.hidden_size; }
  Tensor columns(int64_t d, int64_t first, int64_t count) const {
    const int64_t N = call.sizes.rows;
    return view(all, {N, count}, {width(), 1}, d * N * width() + first);
  }
  // Transposed: [count, N].
  Tensor rows(int64_t d, int64_t first, int64_t count) const {
    const int64_t N = call.sizes.rows;
    return view(all, {count, N}, {1, width()}, d * N * width() + first);
  }
};

// grad_input [N, I] = Σ_d dgates_x W_ih
void input_gradient(const Call& call, const LayerInputs& in, const GateGrads& grads, const Tensor& grad_input) {
  const int64_t N = call.sizes.rows, I = call.sizes.input_size, H = call.sizes.hidden_size, G = call.gate_rows();
  const Tensor out = view(grad_input, {N, I}, {I, 1});
  for (int64_t d = 0; d < call.sizes.directions; ++d) {
    Tensor weight = in.weights[size_t(d * call.sizes.weights_per_direction)];
    if (in.cell == Cell::kGru) {  // rows in the order of the planes: n r z
      const Tensor turned = call.new_tensor({G, I});
      const auto rows = [&](const Tensor& tensor, int64_t first, int64_t count) {
        return view(tensor, {count, I}, {tensor.stride(0), tensor.stride(1)}, first * tensor.stride(0));
      };
      copy(rows(turned, 0, H), rows(weight, 2 * H, H));
      copy(rows(turned, H, 2 * H), rows(weight, 0, 2 * H));
      weight = turned;
    }
    const Tensor left = grads.columns(d, 0, G);
    d ? multiply_add(out, out, left, weight) : multiply(out, left, weight);
  }
}

// Gradients of all weights into `result`, which has their shapes.
void weight_gradients(Call& call, const LayerInputs& in, const BackwardLayer<void>& layer, const GateGrads& grads,
                      const std::optional<Tensor>& grad_projected, const Tensors& result) {
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions, N = sizes.rows, I = sizes.input_size, H = sizes.hidden_size,
                P = sizes.output_size(), G = call.gate_rows(), each = sizes.weights_per_direction;
  const bool gru = in.cell == Cell::kGru;
  const Tensor x = view(as_contiguous(in.input), {N, I}, {I, 1});
  const Tensor previous = call.new_tensor({D, N, P});
  check(gather_previous(call.arithmetic, layer, layer.output, layer.hx, write(previous), call.stream),
        "previous states");
  std::optional<Tensor> cells, sums;
  if (sizes.proj_size) {
    cells = call.new_tensor({D, N, H});
    check(cell_outputs(call.arithmetic, layer, layer.gates, layer.c, write(*cells), call.stream), "cell outputs");
  }
  if (sizes.has_biases) {
    const int64_t dim = 1;
    sums = torch::stable::sum(grads.all, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
  }
  for (int64_t d = 0; d < D; ++d) {
    const Tensor* const own = result.data() + d * each;
    if (gru) {
      multiply(view(own[0], {2 * H, I}, {I, 1}), grads.rows(d, H, 2 * H), x);
      multiply(view(own[0], {H, I}, {I, 1}, 2 * H * I), grads.rows(d, 0, H), x);
    } else {
      multiply(own[0], grads.rows(d, 0, G), x);
    }
    multiply(own[1], grads.rows(d, gru ? H : 0, G), view(previous, {N, P}, {P, 1}, d * N * P));
    if (sizes.has_biases) {
      const auto part = [&](int64_t first, int64_t count) {
        return view(*sums, {count}, {1}, d * grads.width() + first);
      };
      if (gru) {
        copy(view(own[2], {2 * H}, {1}), part(H, 2 * H));
        copy(view(own[2], {H}, {1}, 2 * H), part(0, H));
      } else {
        copy(own[2], part(0, G));
      }
      copy(own[3], part(gru ? H : 0, G));
    }
    if (sizes.proj_size)
      multiply(own[each - 1], view(*grad_projected, {P, N}, {1, P}, d * N * P),
               view(*cells, {N, H}, {H, 1}, d * N * H));
  }
}

}  // namespace
}  // namespace cuda

Backward backward_layer(const LayerInputs& in, const Incoming& grads, const Known& known, bool need_grad_input,
                        bool need_grad_states, bool need_grad_weights) {
  using namespace cuda;
  Call call(in);
  check_backward(in, call, grads, known);
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions, B = sizes.batch, N = sizes.rows, H = sizes.hidden_size, P = sizes.output_size();
  const bool lstm = in.cell == Cell::kLstm;
  const Plan plan = call.plan(in, true);

  const auto like = [&](const Tensor& tensor, bool needed) {
    if (!needed) return call.new_tensor({0});
    const auto shape = tensor.sizes();
    return shape.size() == 1   ? call.new_tensor({shape[0]})
           : shape.size() == 2 ? call.new_tensor({shape[0], shape[1]})
                               : call.new_tensor({shape[0], shape[1], shape[2]});
  };
  const auto new_state = [&](int64_t size) {
    return !need_grad_states ? call.new_tensor({0})
           : in.step         ? call.new_tensor({B, size})
                             : call.new_tensor({D, B, size});
  };
  const Tensor grad_hx = new_state(P);
  Backward result{like(in.input, need_grad_input), grad_hx, lstm ? new_state(H) : grad_hx, {}};
  result.weights.reserve(in.weights.size());
  for (const Tensor& weight : in.weights) result.weights.push_back(like(weight, need_grad_weights));
  if (call.empty()) {  // no row: the states' gradients pass through, every sum is zero
    const auto pass = [&](const Tensor& to, const OptionalTensor& from) { from ? copy(to, *from) : zero(to); };
    if (need_grad_states) pass(result.hx, grads.h_n);
    if (need_grad_states && lstm) pass(result.cx, grads.c_n);
    for (const Tensor& weight : result.weights) zero(weight);
    return result;
  }

  const Tensor grad_gates = call.new_tensor({D, N, grad_planes(in.cell) * H});
  std::optional<Tensor> grad_projected;
  if (sizes.proj_size) grad_projected = call.new_tensor({D, N, P});

  BackwardLayer<void> layer{};
  static_cast<Shape&>(layer) = call.shape(in);
  layer.hx = call.ready(in.hx);
  layer.cx = call.ready(in.cx);
  layer.output = call.ready(known.output);
  layer.gates = read(known.gates);
  layer.c = read<float>(known.cells);
  layer.grad_output = call.ready(grads.output);
  layer.grad_h_n = call.ready(grads.h_n);
  layer.grad_c_n = call.ready(grads.c_n);
  layer.grad_gates = write(grad_gates);
  layer.grad_projected = write(grad_projected);
  layer.grad_hx = need_grad_states ? write(result.hx) : nullptr;
  layer.grad_cx = need_grad_states && lstm ? write(result.cx) : nullptr;
  plan.tier == Tier::kStep ? run_step(call, in, layer, plan.large) : run_resident(call, in, layer, plan.tier);

  const GateGrads gate_grads{grad_gates, call, in.cell};
  if (need_grad_input) input_gradient(call, in, gate_grads, result.input);
  if (need_grad_weights) weight_gradients(call, in, layer, gate_grads, grad_projected, result.weights);
  return result;
}

}  // namespace rnnfast
