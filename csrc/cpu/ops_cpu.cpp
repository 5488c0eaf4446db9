// The operators on the CPU: from schema to layer and back.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "layer.h"
#include "layers.h"

namespace rnnfast {
namespace {

using OneState = std::tuple<Tensor, Tensor>;
using TwoStates = std::tuple<Tensor, Tensor, Tensor>;
using OneStateSaved = std::tuple<Tensor, Tensor, Tensors>;
using TwoStatesSaved = std::tuple<Tensor, Tensor, Tensor, Tensors>;

OneState rnn_infer(const Tensor& input, const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                   const OptionalTensor& lengths, bool relu) {
  const Forward f = forward_layer(Cell::kRnn, relu, input, hx, nullptr, weights, batch_sizes, lengths, false);
  return {f.output, f.h_n};
}
OneStateSaved rnn_fwd(const Tensor& input, const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, bool relu) {
  const Forward f = forward_layer(Cell::kRnn, relu, input, hx, nullptr, weights, batch_sizes, lengths, true);
  return {f.output, f.h_n, f.saved};
}
OneState gru_infer(const Tensor& input, const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                   const OptionalTensor& lengths) {
  const Forward f = forward_layer(Cell::kGru, false, input, hx, nullptr, weights, batch_sizes, lengths, false);
  return {f.output, f.h_n};
}
OneStateSaved gru_fwd(const Tensor& input, const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths) {
  const Forward f = forward_layer(Cell::kGru, false, input, hx, nullptr, weights, batch_sizes, lengths, true);
  return {f.output, f.h_n, f.saved};
}
TwoStates lstm_infer(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensors& weights,
                     const OptionalTensor& batch_sizes, const OptionalTensor& lengths) {
  const Forward f = forward_layer(Cell::kLstm, false, input, hx, &cx, weights, batch_sizes, lengths, false);
  return {f.output, f.h_n, f.c_n};
}
TwoStatesSaved lstm_fwd(const Tensor& input, const Tensor& hx, const Tensor& cx, const Tensors& weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths) {
  const Forward f = forward_layer(Cell::kLstm, false, input, hx, &cx, weights, batch_sizes, lengths, true);
  return {f.output, f.h_n, f.c_n, f.saved};
}

OneStateSaved rnn_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                      const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, bool relu, const Tensor& output, const Tensors& saved,
                      bool need_grad_input, bool need_grad_weights) {
  const Backward b = backward_layer(Cell::kRnn, relu, grad_output, grad_h_n, std::nullopt, input, hx, nullptr, weights,
                                    batch_sizes, lengths, output, saved, need_grad_input, need_grad_weights);
  return {b.input, b.hx, b.weights};
}
OneStateSaved gru_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const Tensor& input,
                      const Tensor& hx, const Tensors& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, const Tensor& output, const Tensors& saved, bool need_grad_input,
                      bool need_grad_weights) {
  const Backward b = backward_layer(Cell::kGru, false, grad_output, grad_h_n, std::nullopt, input, hx, nullptr, weights,
                                    batch_sizes, lengths, output, saved, need_grad_input, need_grad_weights);
  return {b.input, b.hx, b.weights};
}
TwoStatesSaved lstm_bwd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& hx, const Tensor& cx,
                        const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                        const Tensor& output, const Tensors& saved, bool need_grad_input, bool need_grad_weights) {
  const Backward b = backward_layer(Cell::kLstm, false, grad_output, grad_h_n, grad_c_n, input, hx, &cx, weights,
                                    batch_sizes, lengths, output, saved, need_grad_input, need_grad_weights);
  return {b.input, b.hx, b.cx, b.weights};
}

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace rnnfast

// The schemas are defined in rnnfast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("rnn_infer", TORCH_BOX(&rnnfast::rnn_infer));
  m.impl("rnn_fwd", TORCH_BOX(&rnnfast::rnn_fwd));
  m.impl("rnn_bwd", TORCH_BOX(&rnnfast::rnn_bwd));
  m.impl("gru_infer", TORCH_BOX(&rnnfast::gru_infer));
  m.impl("gru_fwd", TORCH_BOX(&rnnfast::gru_fwd));
  m.impl("gru_bwd", TORCH_BOX(&rnnfast::gru_bwd));
  m.impl("lstm_infer", TORCH_BOX(&rnnfast::lstm_infer));
  m.impl("lstm_fwd", TORCH_BOX(&rnnfast::lstm_fwd));
  m.impl("lstm_bwd", TORCH_BOX(&rnnfast::lstm_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&rnnfast::cpu_isa)); }
