// The operators, from schema to layer and back, alike for every library: include once, then call
// implement_operators(m). Schemas: rnnfast/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "common/layers.h"

namespace rnnfast {
namespace {

using OneState = std::tuple<Tensor, Tensor>;
using TwoStates = std::tuple<Tensor, Tensor, Tensor>;
using TwoStatesSaved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using TwoStepStatesSaved = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using OneStateGrads = std::tuple<Tensor, Tensor, Tensors>;
using TwoStatesGrads = std::tuple<Tensor, Tensor, Tensor, Tensors>;

const OptionalTensor kNone;

// ---- layers

OneState rnn_infer(const Tensor& input, const OptionalTensor& hx, const Tensors& weights,
                   const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool relu, int64_t num_layers) {
  Forward f = forward_stack({Cell::kRnn, relu, false, input, hx, kNone, weights, batch_sizes, lengths}, num_layers);
  return {std::move(f.output), std::move(f.h_n)};
}
OneState rnn_fwd(const Tensor& input, const OptionalTensor& hx, const Tensors& weights,
                 const OptionalTensor& batch_sizes, const OptionalTensor& lengths, bool relu) {
  Forward f = forward_layer({Cell::kRnn, relu, false, input, hx, kNone, weights, batch_sizes, lengths}, true);
  return {std::move(f.output), std::move(f.h_n)};
}
OneState gru_infer(const Tensor& input, const OptionalTensor& hx, const Tensors& weights,
                   const OptionalTensor& batch_sizes, const OptionalTensor& lengths, int64_t num_layers) {
  Forward f = forward_stack({Cell::kGru, false, false, input, hx, kNone, weights, batch_sizes, lengths}, num_layers);
  return {std::move(f.output), std::move(f.h_n)};
}
TwoStates gru_fwd(const Tensor& input, const OptionalTensor& hx, const Tensors& weights,
                  const OptionalTensor& batch_sizes, const OptionalTensor& lengths) {
  Forward f = forward_layer({Cell::kGru, false, false, input, hx, kNone, weights, batch_sizes, lengths}, true);
  return {std::move(f.output), std::move(f.h_n), std::move(*f.gates)};
}
TwoStates lstm_infer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensors& weights,
                     const OptionalTensor& batch_sizes, const OptionalTensor& lengths, int64_t num_layers) {
  Forward f = forward_stack({Cell::kLstm, false, false, input, hx, cx, weights, batch_sizes, lengths}, num_layers);
  return {std::move(f.output), std::move(f.h_n), std::move(f.c_n)};
}
TwoStatesSaved lstm_fwd(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx, const Tensors& weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths) {
  Forward f = forward_layer({Cell::kLstm, false, false, input, hx, cx, weights, batch_sizes, lengths}, true);
  return {std::move(f.output), std::move(f.h_n), std::move(f.c_n), std::move(*f.gates), std::move(*f.cells)};
}

OneStateGrads rnn_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                      const OptionalTensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, bool relu, const Tensor& output, bool need_grad_input,
                      bool need_grad_states, bool need_grad_weights) {
  Backward b = backward_layer({Cell::kRnn, relu, false, input, hx, kNone, weights, batch_sizes, lengths},
                              {grad_output, grad_h_n, kNone}, {output, kNone, kNone}, need_grad_input, need_grad_states,
                              need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.weights)};
}
OneStateGrads gru_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                      const OptionalTensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, const Tensor& output, const Tensor& saved, bool need_grad_input,
                      bool need_grad_states, bool need_grad_weights) {
  Backward b = backward_layer({Cell::kGru, false, false, input, hx, kNone, weights, batch_sizes, lengths},
                              {grad_output, grad_h_n, kNone}, {output, saved, kNone}, need_grad_input, need_grad_states,
                              need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.weights)};
}
TwoStatesGrads lstm_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& hx,
                        const OptionalTensor& cx, const Tensors& weights, const OptionalTensor& batch_sizes,
                        const OptionalTensor& lengths, const Tensor& output, const Tensor& gates, const Tensor& cells,
                        bool need_grad_input, bool need_grad_states, bool need_grad_weights) {
  Backward b = backward_layer({Cell::kLstm, false, false, input, hx, cx, weights, batch_sizes, lengths},
                              {grad_output, grad_h_n, grad_c_n}, {output, gates, cells}, need_grad_input,
                              need_grad_states, need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.cx), std::move(b.weights)};
}

// ---- one step: a direction without a projection; its output is h_n

Tensors step_weights(const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  RNNFAST_REQUIRE(bias_ih.has_value() == bias_hh.has_value(), "weights: expected 2 biases or none, got 1");
  return bias_ih ? Tensors{weight_ih, weight_hh, *bias_ih, *bias_hh} : Tensors{weight_ih, weight_hh};
}

Tensor rnn_step_infer(const Tensor& input, const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool relu) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  return forward_layer({Cell::kRnn, relu, true, input, hx, kNone, weights, kNone, kNone}, false).h_n;
}
Tensor rnn_step_fwd(const Tensor& input, const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, bool relu) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  return forward_layer({Cell::kRnn, relu, true, input, hx, kNone, weights, kNone, kNone}, true).h_n;
}
Tensor gru_step_infer(const Tensor& input, const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  return forward_layer({Cell::kGru, false, true, input, hx, kNone, weights, kNone, kNone}, false).h_n;
}
OneState gru_step_fwd(const Tensor& input, const OptionalTensor& hx, const Tensor& weight_ih, const Tensor& weight_hh,
                      const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Forward f = forward_layer({Cell::kGru, false, true, input, hx, kNone, weights, kNone, kNone}, true);
  return {std::move(f.h_n), std::move(*f.gates)};
}
OneState lstm_step_infer(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                         const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                         const OptionalTensor& bias_hh) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Forward f = forward_layer({Cell::kLstm, false, true, input, hx, cx, weights, kNone, kNone}, false);
  return {std::move(f.h_n), std::move(f.c_n)};
}
TwoStepStatesSaved lstm_step_fwd(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                 const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                 const OptionalTensor& bias_hh) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Forward f = forward_layer({Cell::kLstm, false, true, input, hx, cx, weights, kNone, kNone}, true);
  return {std::move(f.h_n), std::move(f.c_n), std::move(*f.gates), std::move(*f.cells)};
}

OneStateGrads rnn_step_bwd(const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& hx,
                           const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                           const OptionalTensor& bias_hh, bool relu, const Tensor& h_n, bool need_grad_input,
                           bool need_grad_states, bool need_grad_weights) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Backward b =
      backward_layer({Cell::kRnn, relu, true, input, hx, kNone, weights, kNone, kNone}, {kNone, grad_h_n, kNone},
                     {h_n, kNone, kNone}, need_grad_input, need_grad_states, need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.weights)};
}
OneStateGrads gru_step_bwd(const OptionalTensor& grad_h_n, const Tensor& input, const OptionalTensor& hx,
                           const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                           const OptionalTensor& bias_hh, const Tensor& saved, bool need_grad_input,
                           bool need_grad_states, bool need_grad_weights) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Backward b =
      backward_layer({Cell::kGru, false, true, input, hx, kNone, weights, kNone, kNone}, {kNone, grad_h_n, kNone},
                     {kNone, saved, kNone}, need_grad_input, need_grad_states, need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.weights)};
}
TwoStatesGrads lstm_step_bwd(const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& input,
                             const OptionalTensor& hx, const OptionalTensor& cx, const Tensor& weight_ih,
                             const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                             const Tensor& gates, const Tensor& cells, bool need_grad_input, bool need_grad_states,
                             bool need_grad_weights) {
  const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Backward b =
      backward_layer({Cell::kLstm, false, true, input, hx, cx, weights, kNone, kNone}, {kNone, grad_h_n, grad_c_n},
                     {kNone, gates, cells}, need_grad_input, need_grad_states, need_grad_weights);
  return {std::move(b.input), std::move(b.hx), std::move(b.cx), std::move(b.weights)};
}

template <class Library>
void implement_operators(Library& m) {
  m.impl("rnn_infer", TORCH_BOX(&rnn_infer));
  m.impl("rnn_fwd", TORCH_BOX(&rnn_fwd));
  m.impl("rnn_bwd", TORCH_BOX(&rnn_bwd));
  m.impl("rnn_step_infer", TORCH_BOX(&rnn_step_infer));
  m.impl("rnn_step_fwd", TORCH_BOX(&rnn_step_fwd));
  m.impl("rnn_step_bwd", TORCH_BOX(&rnn_step_bwd));
  m.impl("gru_infer", TORCH_BOX(&gru_infer));
  m.impl("gru_fwd", TORCH_BOX(&gru_fwd));
  m.impl("gru_bwd", TORCH_BOX(&gru_bwd));
  m.impl("gru_step_infer", TORCH_BOX(&gru_step_infer));
  m.impl("gru_step_fwd", TORCH_BOX(&gru_step_fwd));
  m.impl("gru_step_bwd", TORCH_BOX(&gru_step_bwd));
  m.impl("lstm_infer", TORCH_BOX(&lstm_infer));
  m.impl("lstm_fwd", TORCH_BOX(&lstm_fwd));
  m.impl("lstm_bwd", TORCH_BOX(&lstm_bwd));
  m.impl("lstm_step_infer", TORCH_BOX(&lstm_step_infer));
  m.impl("lstm_step_fwd", TORCH_BOX(&lstm_step_fwd));
  m.impl("lstm_step_bwd", TORCH_BOX(&lstm_step_bwd));
}

}  // namespace
}  // namespace rnnfast
