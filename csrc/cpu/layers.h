// One layer with all its directions, forward and backward: what ops_cpu.cpp registers as operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/check.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

struct Forward {
  Tensor output, h_n, c_n;      // for a step h_n and c_n alone
  std::optional<Tensor> saved;  // none for the RNN
};

struct Backward {
  Tensor input, hx, cx;
  Tensors weights;
};

struct Incoming {
  const OptionalTensor &output, &h_n, &c_n;
};

Forward forward_layer(const LayerInputs& in, bool save);

// `output` and `saved` are forward's. For a step `output` is its h_n, whose gradient is grads.h_n; only the RNN's is
// read.
Backward backward_layer(const LayerInputs& in, const Incoming& grads, const OptionalTensor& output,
                        const OptionalTensor& saved, bool need_grad_input, bool need_grad_states,
                        bool need_grad_weights);

}  // namespace rnnfast
