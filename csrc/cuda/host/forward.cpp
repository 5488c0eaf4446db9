// Forward of a layer on the GPU. torch multiplies x by W_ih, one product per direction. Then the kernels of a tier run
// the recurrence.
#include "cuda/host/host.h"

#include "cuda/device/around.h"

namespace rnnfast {
namespace cuda {
namespace {

// gates_x [D, N, G*H]: x W_ih^T and all biases but the GRU's b_hn.
void project_input(Call& call, const LayerInputs& in, const Tensor& gates_x) {
  const int64_t D = call.sizes.directions(), N = call.sizes.rows, I = call.sizes.input_size, G = call.gate_rows();
  const LayerWeights weights(call.sizes.weights, in.weights);
  const Tensor x = view(as_contiguous(in.input), {N, I}, {I, 1});
  std::optional<Tensor> biases;
  if (weights.has_biases()) {
    biases = call.new_tensor({D, G});
    BiasSum sum{call.arithmetic, in.cell, int(call.sizes.hidden_size), int(D), {}, {}, write(*biases)};
    for (int64_t d = 0; d < D; ++d) {
      sum.bias_ih[d] = call.ready(weights.bias_ih(d));
      sum.bias_hh[d] = call.ready(weights.bias_hh(d));
    }
    check_cuda(sum_biases(sum, call.stream), "sum of biases");
  }
  for (int64_t d = 0; d < D; ++d) {
    const Tensor& weight = weights.weight_ih(d);
    const Tensor transposed = view(weight, {I, G}, {weight.stride(1), weight.stride(0)});
    const Tensor out = view(gates_x, {N, G}, {G, 1}, d * N * G);
    biases ? multiply_add(out, view(*biases, {G}, {1}, d * G), x, transposed) : multiply(out, x, transposed);
  }
}

void run_resident(Call& call, const LayerInputs& in, ForwardLayer<void> layer, Tier tier) {
  call.ready_weights(in, layer.weights);
  const std::optional<Tensor> exchange = call.exchange(tier, layer, false);
  check_cuda(with_arithmetic(call.arithmetic,
                             [&]<Arithmetic kArithmetic>() {
                               return run_resident_forward<kArithmetic>(tier, layer, write(exchange), call.stream);
                             }),
             std::string("forward, tier ") + kTierNames[int(tier)]);
}

void run_step(Call& call, const LayerInputs& in, const ForwardLayer<void>& layer, bool large) {
  StepForward<void> step{};
  static_cast<ForwardLayer<void>&>(step) = layer;
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions(), B = sizes.batch, H = sizes.hidden_size;
  const LayerWeights weights(sizes.weights, in.weights);
  for (int64_t d = 0; d < D; ++d) {
    step.recurrent[d] = call.aligned(weights.weight_hh(d));
    if (weights.is_projected()) step.projection[d] = call.aligned(weights.weight_hr(d));
  }
  std::optional<Tensor> carry, unprojected;
  if (has_c(in.cell) && !layer.c) carry = empty(call.device, call.wide, {D, B, H});
  if (weights.is_projected()) unprojected = call.new_tensor({D, B, H});
  step.carry = write<float>(carry);
  step.cells = write(unprojected);
  step.aligned =
      call.rows_aligned(layer.output, sizes.output_size()) && call.rows_aligned(layer.hx, sizes.output_size());
  step.aligned_cells = call.rows_aligned(step.cells, H);
  check_cuda(with_arithmetic(
                 call.arithmetic,
                 [&]<Arithmetic kArithmetic>() { return run_step_forward<kArithmetic>(step, large, call.stream); }),
             "forward, tier step");
}

// Without a row, the states pass through.
void pass_states(Call& call, const LayerInputs& in, const LayerOutputs& result) {
  in.hx ? copy(result.h_n, *in.hx) : zero(result.h_n);
  if (has_c(in.cell)) in.cx ? copy(result.c_n, *in.cx) : zero(result.c_n);
  if (result.gates) zero(*result.gates);
  if (result.c) zero(*result.c);
  if (call.sizes.rows) zero(result.output);
}

}  // namespace
}  // namespace cuda

namespace {

// `final_h` and `final_c` are where h_n and c_n go; null: to new tensors.
LayerOutputs run_layer(const LayerInputs& in, bool save, const OptionalTensor& final_h, const OptionalTensor& final_c) {
  using namespace cuda;
  Call call(in);
  const LayerSizes& sizes = call.sizes;
  const int64_t D = sizes.directions(), B = sizes.batch, N = sizes.rows, H = sizes.hidden_size, P = sizes.output_size();
  const bool with_c = has_c(in.cell);
  const Plan plan = call.plan(in, false);

  const auto new_state = [&](int64_t size) {
    return in.single_step ? call.new_tensor({B, size}) : call.new_tensor({D, B, size});
  };
  const Tensor h_n = final_h ? *final_h : new_state(P);
  // The output of a single step is its h_n. Kernels write both, to the same place.
  const Tensor output = in.single_step        ? h_n
                        : in.rows.batch_sizes ? call.new_tensor({N, D * P})
                                              : call.new_tensor({sizes.steps, B, D * P});
  LayerOutputs result{output, h_n, !with_c ? h_n : final_c ? *final_c : new_state(H), std::nullopt, std::nullopt};
  if (save && saved_planes(in.cell) > 0) result.gates = call.new_tensor({D, N, saved_planes(in.cell) * H});
  if (save && with_c) result.c = empty(call.device, call.wide, {D, N, H});
  if (call.empty()) {
    pass_states(call, in, result);
    return result;
  }

  // The LSTM's activated gates overwrite gates_x, from which they are computed.
  const Tensor gates_x = save && in.cell == Cell::kLstm ? *result.gates : call.new_tensor({D, N, call.gate_rows()});
  project_input(call, in, gates_x);

  ForwardLayer<void> layer{};
  static_cast<Shape&>(layer) = call.shape(in);
  layer.hx = call.ready(in.hx);
  layer.cx = call.ready(in.cx);
  layer.gates_x = read(gates_x);
  layer.output = write(result.output);
  layer.h_n = write(result.h_n);
  layer.c_n = with_c ? write(result.c_n) : nullptr;
  layer.gates = write(result.gates);
  layer.c = write<float>(result.c);
  for (int64_t d = 0; d < D; ++d) layer.weights[d].bias_hn = call.bias_hn(in, d);
  plan.tier == Tier::kStep ? run_step(call, in, layer, plan.large) : run_resident(call, in, layer, plan.tier);
  return result;
}

}  // namespace

LayerOutputs forward_layer(const LayerInputs& in, bool save) { return run_layer(in, save, std::nullopt, std::nullopt); }

LayerOutputs forward_stack(const LayerInputs& in, int64_t num_layers) {
  if (num_layers == 1) return forward_layer(in, false);
  const LayerSizes sizes = check_layer(in, num_layers);
  const cuda::TensorDevice device = cuda::device_of(in.input);
  const torch::headeronly::ScalarType type = in.input.scalar_type();
  const int64_t D = sizes.directions(), B = sizes.batch, P = sizes.output_size(), H = sizes.hidden_size;
  const bool with_c = has_c(in.cell);
  const Tensor h_n = cuda::empty(device, type, {num_layers * D, B, P});
  const Tensor c_n = with_c ? cuda::empty(device, type, {num_layers * D, B, H}) : h_n;
  const auto of_layer = [&](const Tensor& states, int64_t k) -> OptionalTensor {
    const int64_t stride = states.stride(0);
    return cuda::view(states, {D, B, states.size(2)}, {stride, states.stride(1), states.stride(2)}, k * D * stride);
  };
  LayerOutputs result{in.input, h_n, c_n, std::nullopt, std::nullopt};
  const int64_t each = sizes.weights.per_layer();
  for (int64_t k = 0; k < num_layers; ++k) {
    const Tensors weights(in.weights.begin() + k * each, in.weights.begin() + (k + 1) * each);
    const OptionalTensor hx = in.hx ? of_layer(*in.hx, k) : std::nullopt,
                         cx = in.cx ? of_layer(*in.cx, k) : std::nullopt;
    const LayerInputs layer{in.cell, in.relu, false, result.output, hx, cx, weights, in.rows};
    result.output = run_layer(layer, false, of_layer(h_n, k), with_c ? of_layer(c_n, k) : std::nullopt).output;
  }
  return result;
}

}  // namespace rnnfast
