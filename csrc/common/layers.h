// Layers with all their directions, forward and backward: what a library implements and operators.h registers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

struct Forward {
  Tensor output, h_n, c_n;      // for a step h_n and c_n alone
  OptionalTensor gates, cells;  // saved for backward
};

struct Backward {
  Tensor input, hx, cx;
  Tensors weights;
};

struct Incoming {
  const OptionalTensor &output, &h_n, &c_n;
};

Forward forward_layer(const LayerInputs& in, bool save);
// A stack of layers, saving nothing; `in` has the weights and states of all of them.
Forward forward_stack(const LayerInputs& in, int64_t num_layers);

// What forward returned. For a step `output` is its h_n, whose gradient is Incoming::h_n; only the RNN's is read.
struct Known {
  const OptionalTensor &output, &gates, &cells;
};

Backward backward_layer(const LayerInputs& in, const Incoming& grads, const Known& known, bool need_grad_input,
                        bool need_grad_states, bool need_grad_weights);

}  // namespace rnnfast
