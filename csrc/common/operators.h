// The operators of every cell, from their schemas (rnnfast/ops.py) to the functions of layers.h. A library includes
// this once and calls implement_operators(m).
//
// A registered function must have exactly the parameters of its schema. Only a few of them depend on the cell. So each
// operator is one template for all cells, and packs stand for the parameters that differ:
//   State   hx, and cx if the cell has c; likewise grad_h_n and grad_c_n
//   Flag    relu; only the RNN has it
//   Kept    what forward saved; none for the RNN
//   Known   the same in a single step; for the RNN it is h_n
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <string>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "common/layers.h"

namespace rnnfast {
namespace {

// A list of types.
template <class... T>
struct Pack {};
template <class T, size_t>
using Each = T;
template <class T, size_t... i>
Pack<Each<T, i>...> repeat(std::index_sequence<i...>);
// Pack<T, T, ...> with `count` times T.
template <class T, int count>
using Repeat = decltype(repeat<T>(std::make_index_sequence<count>()));

const OptionalTensor kNone;

// These three return results in the order of the schemas.

template <Cell cell>
auto final_states(LayerOutputs& outputs) {
  if constexpr (has_c(cell))
    return std::tuple(std::move(outputs.h_n), std::move(outputs.c_n));
  else
    return std::tuple(std::move(outputs.h_n));
}

template <Cell cell>
auto saved_tensors(LayerOutputs& outputs) {
  if constexpr (has_c(cell))
    return std::tuple(std::move(*outputs.gates), std::move(*outputs.c));
  else if constexpr (saved_planes(cell) > 0)
    return std::tuple(std::move(*outputs.gates));
  else
    return std::tuple();
}

template <Cell cell>
auto gradients(LayerGradients grads) {
  if constexpr (has_c(cell))
    return std::tuple(std::move(grads.input), std::move(grads.hx), std::move(grads.cx), std::move(grads.weights));
  else
    return std::tuple(std::move(grads.input), std::move(grads.hx), std::move(grads.weights));
}

Tensors step_weights(const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                     const OptionalTensor& bias_hh) {
  RNNFAST_REQUIRE(bias_ih.has_value() == bias_hh.has_value(), "weights: expected 2 biases or none, got 1");
  return bias_ih ? Tensors{weight_ih, weight_hh, *bias_ih, *bias_hh} : Tensors{weight_ih, weight_hh};
}

template <Cell cell, class States, class Flags, class AllKept, class AllKnown>
struct Operators;

template <Cell cell, class... State, class... Flag, class... Kept, class... Known>
struct Operators<cell, Pack<State...>, Pack<Flag...>, Pack<Kept...>, Pack<Known...>> {
  // ---- a layer; `infer` takes a stack of layers

  static auto infer(const Tensor& input, State... states, const Tensors& weights, const OptionalTensor& batch_sizes,
                    const OptionalTensor& lengths, Flag... relu, int64_t num_layers) {
    LayerOutputs outputs =
        forward_stack(layer(input, weights, {batch_sizes, lengths}, (relu || ... || false), states...), num_layers);
    return std::tuple_cat(std::tuple(std::move(outputs.output)), final_states<cell>(outputs));
  }

  static auto fwd(const Tensor& input, State... states, const Tensors& weights, const OptionalTensor& batch_sizes,
                  const OptionalTensor& lengths, Flag... relu) {
    LayerOutputs outputs =
        forward_layer(layer(input, weights, {batch_sizes, lengths}, (relu || ... || false), states...), true);
    return std::tuple_cat(std::tuple(std::move(outputs.output)), final_states<cell>(outputs),
                          saved_tensors<cell>(outputs));
  }

  static auto bwd(const OptionalTensor& grad_output, State... grad_states, const Tensor& input, State... states,
                  const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                  Flag... relu, const Tensor& output, Kept... kept, bool need_grad_input, bool need_grad_states,
                  bool need_grad_weights) {
    return gradients<cell>(
        backward_layer(layer(input, weights, {batch_sizes, lengths}, (relu || ... || false), states...),
                       output_gradients(grad_output, grad_states...), saved(output, kept...),
                       {need_grad_input, need_grad_states, need_grad_weights}));
  }

  // ---- a single step of one direction, without a projection; its output is h_n

  static auto step_infer(const Tensor& input, State... states, const Tensor& weight_ih, const Tensor& weight_hh,
                         const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, Flag... relu) {
    const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
    LayerOutputs outputs = forward_layer(step(input, weights, (relu || ... || false), states...), false);
    return final_states<cell>(outputs);
  }

  static auto step_fwd(const Tensor& input, State... states, const Tensor& weight_ih, const Tensor& weight_hh,
                       const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, Flag... relu) {
    const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
    LayerOutputs outputs = forward_layer(step(input, weights, (relu || ... || false), states...), true);
    return std::tuple_cat(final_states<cell>(outputs), saved_tensors<cell>(outputs));
  }

  static auto step_bwd(State... grad_states, const Tensor& input, State... states, const Tensor& weight_ih,
                       const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                       Flag... relu, Known... known, bool need_grad_input, bool need_grad_states,
                       bool need_grad_weights) {
    const Tensors weights = step_weights(weight_ih, weight_hh, bias_ih, bias_hh);
    const Needs needs{need_grad_input, need_grad_states, need_grad_weights};
    const LayerInputs in = step(input, weights, (relu || ... || false), states...);
    if constexpr (saved_planes(cell) == 0)
      return gradients<cell>(backward_layer(in, output_gradients(kNone, grad_states...), saved(known...), needs));
    else
      return gradients<cell>(
          backward_layer(in, output_gradients(kNone, grad_states...), saved(kNone, known...), needs));
  }

 private:
  // These four collect an operator's arguments by reference. What the cell lacks is null.

  static LayerInputs layer(const Tensor& input, const Tensors& weights, Rows rows, bool relu, const OptionalTensor& hx,
                           const OptionalTensor& cx = kNone) {
    return {cell, relu, false, input, hx, cx, weights, rows};
  }
  static LayerInputs step(const Tensor& input, const Tensors& weights, bool relu, const OptionalTensor& hx,
                          const OptionalTensor& cx = kNone) {
    return {cell, relu, true, input, hx, cx, weights, {kNone, kNone}};
  }
  static OutputGradients output_gradients(const OptionalTensor& output, const OptionalTensor& h_n,
                                          const OptionalTensor& c_n = kNone) {
    return {output, h_n, c_n};
  }
  static Saved saved(const OptionalTensor& output, const OptionalTensor& gates = kNone,
                     const OptionalTensor& c = kNone) {
    return {output, gates, c};
  }
};

template <Cell cell, class Library>
void implement_cell(Library& m) {
  constexpr CellSpec spec = spec_of(cell);
  constexpr int saved = (spec.saved_planes > 0) + has_c(cell);
  using Own = Operators<cell, Repeat<const OptionalTensor&, spec.states>, Repeat<bool, spec.takes_relu>,
                        Repeat<const Tensor&, saved>, Repeat<const Tensor&, saved ? saved : 1>>;
  const std::string name = spec.operators;
  m.impl((name + "_infer").c_str(), TORCH_BOX(&Own::infer));
  m.impl((name + "_fwd").c_str(), TORCH_BOX(&Own::fwd));
  m.impl((name + "_bwd").c_str(), TORCH_BOX(&Own::bwd));
  m.impl((name + "_step_infer").c_str(), TORCH_BOX(&Own::step_infer));
  m.impl((name + "_step_fwd").c_str(), TORCH_BOX(&Own::step_fwd));
  m.impl((name + "_step_bwd").c_str(), TORCH_BOX(&Own::step_bwd));
}

template <class Library>
void implement_operators(Library& m) {
  implement_cell<Cell::kRnn>(m);
  implement_cell<Cell::kGru>(m);
  implement_cell<Cell::kLstm>(m);
}

}  // namespace
}  // namespace rnnfast
