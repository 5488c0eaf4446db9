// Forward of a layer on the GPU: gates_x = x W_ih^T + biases as one product per direction, then the recurrence.
#include "cuda/host/host.h"

#include "cuda/device/around.h"

namespace rnnfast {
namespace cuda {
namespace {

// gates_x [D, N, G*H]: the input projection with every bias but GRU's b_hn.
void project_input(Call& call, const LayerInputs& in, const Tensor& gates_x) {
  const int64_t N = call.sizes.rows, I = call.sizes.input_size, G = call.gate_rows();
  const Tensor x = view(as_contiguous(in.input), {N, I}, {I, 1});
  const int64_t each = call.sizes.weights_per_direction;
  std::optional<Tensor> biases;
  if (call.sizes.has_biases) {
    biases = call.new_tensor({call.sizes.directions, G});
    BiasSum sum{call.arithmetic, in.cell, int(call.sizes.hidden_size), int(call.sizes.directions), {}, {},
                write(*biases)};
    for (int64_t d = 0; d < call.sizes.directions; ++d) {
      sum.bias_ih[d] = call.ready(in.weights[size_t(d * each + 2)]);
      sum.bias_hh[d] = call.ready(in.weights[size_t(d * each + 3)]);
    }
    check(sum_biases(sum, call.stream), "sum of biases");
  }
  for (int64_t d = 0; d < call.sizes.directions; ++d) {
    const Tensor& weight = in.weights[size_t(d * each)];
    const Tensor transposed = view(weight, {I, G}, {weight.stride(1), weight.stride(0)});
    const Tensor out = view(gates_x, {N, G}, {G, 1}, d * N * G);
    biases ? multiply_add(out, view(*biases, {G}, {1}, d * G), x, transposed) : multiply(out, x, transposed);
  }
}

void run_resident(Call& call, const LayerInputs& in, ForwardLayer<void> layer, Tier tier) {
  call.ready_weights(in, layer.weights);
  const std::optional<Tensor> exchange = call.exchange(tier, layer, false);
  check(with_arithmetic(call.arithmetic,
                        [&]<Arithmetic kArithmetic>() {
                          return run_resident_forward<kArithmetic>(tier, layer, write(exchange), call.stream);
                        }),
        std::string("forward, tier ") + kTierNames[int(tier)]);
}

void run_step(Call& call, const LayerInputs& in, const ForwardLayer<void>& layer, bool large) {
  StepForward<void> step{};
  static_cast<ForwardLayer<void>&>(step) = layer;
  const LayerSizes& sizes = call.sizes;
  for (int64_t d = 0; d < sizes.directions; ++d) {
    const Tensor* const weights = in.weights.data() + d * sizes.weights_per_direction;
    step.recurrent[d] = call.aligned(weights[1]);
    if (sizes.proj_size) step.projection[d] = call.aligned(weights[sizes.weights_per_direction - 1]);
  }
  std::optional<Tensor> carry, cells;
  if (in.cell == Cell::kLstm && !layer.c)
    carry = empty(call.place, call.wide, {sizes.directions, sizes.batch, sizes.hidden_size});
  if (sizes.proj_size) cells = call.new_tensor({sizes.directions, sizes.batch, sizes.hidden_size});
  step.carry = write<float>(carry);
  step.unprojected = write(cells);
  step.aligned =
      call.rows_aligned(layer.output, sizes.output_size()) && call.rows_aligned(layer.hx, sizes.output_size());
  step.aligned_unprojected = call.rows_aligned(step.unprojected, sizes.hidden_size);
  check(with_arithmetic(
            call.arithmetic,
            [&]<Arithmetic kArithmetic>() { return run_step_forward<kArithmetic>(step, large, call.stream); }),
        "forward, tier step");
}

// No row: the states pass through.
void pass_states(Call& call, const LayerInputs& in, const Forward& result) {
  in.hx ? copy(result.h_n, *in.hx) : zero(result.h_n);
  if (in.cell == Cell::kLstm) in.cx ? copy(result.c_n, *in.cx) : zero(result.c_n);
  if (result.gates) zero(*result.gates);
  if (result.cells) zero(*result.cells);
  if (call.sizes.rows) zero(result.output);
}

}  // namespace
}  // namespace cuda

namespace {

// final_h, final_c: where h_n and c_n go; null: to new tensors.
Forward run_layer(const LayerInputs& in, bool save, const OptionalTensor& final_h, const OptionalTensor& final_c) {
  using namespace cuda;
  Call call(in);
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions, B = sizes.batch, N = sizes.rows, H = sizes.hidden_size, P = sizes.output_size();
  const bool lstm = in.cell == Cell::kLstm;
  const Plan plan = call.plan(in, false);

  const auto new_state = [&](int64_t size) {
    return in.step ? call.new_tensor({B, size}) : call.new_tensor({D, B, size});
  };
  const Tensor h_n = final_h ? *final_h : new_state(P);
  // A step's output is its state: both are written, to the same place.
  const Tensor output = in.step          ? h_n
                        : in.batch_sizes ? call.new_tensor({N, D * P})
                                         : call.new_tensor({sizes.steps, B, D * P});
  Forward result{output, h_n, !lstm ? h_n : final_c ? *final_c : new_state(H), std::nullopt, std::nullopt};
  if (save && in.cell != Cell::kRnn) result.gates = call.new_tensor({D, N, saved_planes(in.cell) * H});
  if (save && lstm) result.cells = empty(call.place, call.wide, {D, N, H});
  if (call.empty()) {
    pass_states(call, in, result);
    return result;
  }

  // LSTM's activated gates take the place of what they are made of.
  const Tensor gates_x = save && lstm ? *result.gates : call.new_tensor({D, N, call.gate_rows()});
  project_input(call, in, gates_x);

  ForwardLayer<void> layer{};
  static_cast<Shape&>(layer) = call.shape(in);
  layer.hx = call.ready(in.hx);
  layer.cx = call.ready(in.cx);
  layer.gates_x = read(gates_x);
  layer.output = write(result.output);
  layer.h_n = write(result.h_n);
  layer.c_n = lstm ? write(result.c_n) : nullptr;
  layer.gates = write(result.gates);
  layer.c = write<float>(result.cells);
  for (int64_t d = 0; d < D; ++d) layer.weights[d].bias_hn = call.bias_hn(in, d);
  plan.tier == Tier::kStep ? run_step(call, in, layer, plan.large) : run_resident(call, in, layer, plan.tier);
  return result;
}

}  // namespace

Forward forward_layer(const LayerInputs& in, bool save) { return run_layer(in, save, std::nullopt, std::nullopt); }

Forward forward_stack(const LayerInputs& in, int64_t num_layers) {
  if (num_layers == 1) return forward_layer(in, false);
  const LayerSizes sizes = check_layer(in, num_layers);
  const cuda::Place place = cuda::place_of(in.input);
  const int64_t D = sizes.directions, B = sizes.batch, P = sizes.output_size(), H = sizes.hidden_size;
  const bool lstm = in.cell == Cell::kLstm;
  const Tensor h_n = cuda::empty(place, in.input.scalar_type(), {num_layers * D, B, P});
  const Tensor c_n = lstm ? cuda::empty(place, in.input.scalar_type(), {num_layers * D, B, H}) : h_n;
  const auto of_layer = [&](const Tensor& states, int64_t k) -> OptionalTensor {
    const int64_t stride = states.stride(0);
    return cuda::view(states, {D, B, states.size(2)}, {stride, states.stride(1), states.stride(2)}, k * D * stride);
  };
  Forward result{in.input, h_n, c_n, std::nullopt, std::nullopt};
  const int64_t each = D * sizes.weights_per_direction;
  for (int64_t k = 0; k < num_layers; ++k) {
    const Tensors weights(in.weights.begin() + k * each, in.weights.begin() + (k + 1) * each);
    const OptionalTensor hx = in.hx ? of_layer(*in.hx, k) : std::nullopt,
                         cx = in.cx ? of_layer(*in.cx, k) : std::nullopt;
    const LayerInputs layer{in.cell, in.relu, false, result.output, hx, cx, weights, in.batch_sizes, in.lengths};
    result.output = run_layer(layer, false, of_layer(h_n, k), lstm ? of_layer(c_n, k) : std::nullopt).output;
  }
  return result;
}

}  // namespace rnnfast
