// Backward of a layer on the GPU. The kernels of a tier run the recurrence in reverse. Then torch's products over all
// rows give the gradients of x and of the weights. Every sum has a fixed order.
#include "cuda/host/host.h"

#include "cuda/device/around.h"

namespace rnnfast {
namespace cuda {
namespace {

void run_resident(Call& call, const LayerInputs& in, BackwardLayer<void> layer, Tier tier) {
  call.ready_weights(in, layer.weights);
  // The kernel always writes the states' gradients, so they need memory even where nobody wants them.
  const LayerSizes& sizes = call.sizes;
  std::optional<Tensor> grad_hx, grad_cx;
  if (!layer.grad_hx) {
    grad_hx = call.new_tensor({sizes.directions(), sizes.batch, sizes.output_size()});
    grad_cx = call.new_tensor({sizes.directions(), sizes.batch, sizes.hidden_size});
    layer.grad_hx = write(grad_hx);
    layer.grad_cx = write(grad_cx);
  }
  const std::optional<Tensor> exchange = call.exchange(tier, layer, true);
  check_cuda(with_arithmetic(call.arithmetic,
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
  const LayerWeights weights(sizes.weights, in.weights);
  for (int64_t d = 0; d < sizes.directions(); ++d) {
    step.recurrent[d] = call.aligned_transpose(weights.weight_hh(d));
    if (weights.is_projected()) step.projection[d] = call.aligned_transpose(weights.weight_hr(d));
  }
  std::optional<Tensor> carry;
  if (in.cell != Cell::kRnn) carry = empty(call.device, call.wide, {sizes.directions(), sizes.batch, H});
  step.carry = write<float>(carry);
  // The GRU's planes for W_hh start one H into a row.
  step.aligned = call.rows_aligned(layer.grad_gates, H);
  step.aligned_projected = call.rows_aligned(layer.grad_projected, sizes.output_size());
  check_cuda(with_arithmetic(
                 call.arithmetic,
                 [&]<Arithmetic kArithmetic>() { return run_step_backward<kArithmetic>(step, large, call.stream); }),
             "backward, tier step");
}

// Parts of grad_gates as matrices, without a copy. The GRU's planes are n_x r z n_h.
struct GateGrads {
  const Tensor& all;  // [D, N, planes * H]
  const Call& call;
  Cell cell;

  int64_t width() const { return grad_planes(cell) * call.sizes.hidden_size; }
  // [N, count]: these columns of direction d.
  Tensor columns(int64_t d, int64_t first, int64_t count) const {
    const int64_t N = call.sizes.rows;
    return view(all, {N, count}, {width(), 1}, d * N * width() + first);
  }
  // The transpose, [count, N].
  Tensor rows(int64_t d, int64_t first, int64_t count) const {
    const int64_t N = call.sizes.rows;
    return view(all, {count, N}, {1, width()}, d * N * width() + first);
  }
};

// grad_input [N, I] = Σ_d dgates_x W_ih
void input_gradient(const Call& call, const LayerInputs& in, const GateGrads& grads, const Tensor& grad_input) {
  const int64_t N = call.sizes.rows, I = call.sizes.input_size, H = call.sizes.hidden_size, G = call.gate_rows();
  const Tensor out = view(grad_input, {N, I}, {I, 1});
  const LayerWeights weights(call.sizes.weights, in.weights);
  for (int64_t d = 0; d < call.sizes.directions(); ++d) {
    Tensor weight = weights.weight_ih(d);
    if (in.cell == Cell::kGru) {  // puts the rows into the order of the planes: n r z
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

// Writes the gradients of all weights to `result`, which has their shapes.
void weight_gradients(Call& call, const LayerInputs& in, const BackwardLayer<void>& layer, const GateGrads& grads,
                      const std::optional<Tensor>& grad_projected, const Tensors& result) {
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions(), N = sizes.rows, I = sizes.input_size, H = sizes.hidden_size,
                P = sizes.output_size(), G = call.gate_rows();
  const LayerWeights own(sizes.weights, result);
  const bool gru = in.cell == Cell::kGru;
  const Tensor x = view(as_contiguous(in.input), {N, I}, {I, 1});
  const Tensor previous = call.new_tensor({D, N, P});
  check_cuda(gather_previous(call.arithmetic, layer, layer.output, layer.hx, write(previous), call.stream),
             "previous states");
  std::optional<Tensor> unprojected, sums;
  if (own.is_projected()) {
    unprojected = call.new_tensor({D, N, H});
    check_cuda(cell_outputs(call.arithmetic, layer, layer.gates, layer.c, write(*unprojected), call.stream),
               "cell outputs");
  }
  if (own.has_biases()) {
    const int64_t dim = 1;
    sums = torch::stable::sum(grads.all, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
  }
  for (int64_t d = 0; d < D; ++d) {
    const Tensor& of_weight_ih = own.weight_ih(d);
    if (gru) {
      multiply(view(of_weight_ih, {2 * H, I}, {I, 1}), grads.rows(d, H, 2 * H), x);
      multiply(view(of_weight_ih, {H, I}, {I, 1}, 2 * H * I), grads.rows(d, 0, H), x);
    } else {
      multiply(of_weight_ih, grads.rows(d, 0, G), x);
    }
    multiply(own.weight_hh(d), grads.rows(d, gru ? H : 0, G), view(previous, {N, P}, {P, 1}, d * N * P));
    if (own.has_biases()) {
      const auto part = [&](int64_t first, int64_t count) {
        return view(*sums, {count}, {1}, d * grads.width() + first);
      };
      if (gru) {
        copy(view(own.bias_ih(d), {2 * H}, {1}), part(H, 2 * H));
        copy(view(own.bias_ih(d), {H}, {1}, 2 * H), part(0, H));
      } else {
        copy(own.bias_ih(d), part(0, G));
      }
      copy(own.bias_hh(d), part(gru ? H : 0, G));
    }
    if (own.is_projected())
      multiply(own.weight_hr(d), view(*grad_projected, {P, N}, {1, P}, d * N * P),
               view(*unprojected, {N, H}, {H, 1}, d * N * H));
  }
}

}  // namespace
}  // namespace cuda

LayerGradients backward_layer(const LayerInputs& in, const OutputGradients& grads, const Saved& saved, Needs needs) {
  using namespace cuda;
  Call call(in);
  check_backward(in, call.sizes, grads, saved, call.wide);
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions(), B = sizes.batch, N = sizes.rows, H = sizes.hidden_size, P = sizes.output_size();
  const bool with_c = has_c(in.cell);
  const Plan plan = call.plan(in, true);

  const auto like = [&](const Tensor& tensor, bool needed) {
    if (!needed) return call.new_tensor({0});
    const auto shape = tensor.sizes();
    return shape.size() == 1   ? call.new_tensor({shape[0]})
           : shape.size() == 2 ? call.new_tensor({shape[0], shape[1]})
                               : call.new_tensor({shape[0], shape[1], shape[2]});
  };
  const auto new_state = [&](int64_t size) {
    return !needs.states    ? call.new_tensor({0})
           : in.single_step ? call.new_tensor({B, size})
                            : call.new_tensor({D, B, size});
  };
  const Tensor grad_hx = new_state(P);
  LayerGradients result{like(in.input, needs.input), grad_hx, with_c ? new_state(H) : grad_hx, {}};
  result.weights.reserve(in.weights.size());
  for (const Tensor& weight : in.weights) result.weights.push_back(like(weight, needs.weights));
  if (call.empty()) {  // no row: the gradients of the states pass through, every sum is zero
    const auto pass = [&](const Tensor& to, const OptionalTensor& from) { from ? copy(to, *from) : zero(to); };
    if (needs.states) pass(result.hx, grads.h_n);
    if (needs.states && with_c) pass(result.cx, grads.c_n);
    for (const Tensor& weight : result.weights) zero(weight);
    return result;
  }

  const Tensor grad_gates = call.new_tensor({D, N, grad_planes(in.cell) * H});
  std::optional<Tensor> grad_projected;
  if (sizes.proj_size > 0) grad_projected = call.new_tensor({D, N, P});

  BackwardLayer<void> layer{};
  static_cast<Shape&>(layer) = call.shape(in);
  layer.hx = call.ready(in.hx);
  layer.cx = call.ready(in.cx);
  layer.output = call.ready(saved.output);
  layer.gates = read(saved.gates);
  layer.c = read<float>(saved.c);
  layer.grad_output = call.ready(grads.output);
  layer.grad_h_n = call.ready(grads.h_n);
  layer.grad_c_n = call.ready(grads.c_n);
  layer.grad_gates = write(grad_gates);
  layer.grad_projected = write(grad_projected);
  layer.grad_hx = needs.states ? write(result.hx) : nullptr;
  layer.grad_cx = needs.states && with_c ? write(result.cx) : nullptr;
  plan.tier == Tier::kStep ? run_step(call, in, layer, plan.large) : run_resident(call, in, layer, plan.tier);

  const GateGrads gate_grads{grad_gates, call, in.cell};
  if (needs.input) input_gradient(call, in, gate_grads, result.input);
  if (needs.weights) weight_gradients(call, in, layer, gate_grads, grad_projected, result.weights);
  return result;
}

}  // namespace rnnfast
