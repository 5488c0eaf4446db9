// The functions that the host code of each device implements: forward and backward of a layer with all its directions.
// operators.h makes the registered operators from them. rnnfast/ops.py describes the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/cell_spec.h"
#include "common/weights.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Which rows a batch has. A call gives batch_sizes (a packed batch), or lengths, or neither (all sequences have T
// steps).
struct Rows {
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
};

// The arguments that forward and backward share, by reference.
struct LayerInputs {
  Cell cell;
  bool relu;
  bool single_step;  // one step of a cell module: input [B, I] and states [B, H], not [T, B, I] and [D, B, Hout]
  const Tensor& input;
  const OptionalTensor &hx, &cx;  // null: zeros
  const Tensors& weights;
  Rows rows;
};

// Sizes of a layer, or of the first layer of a stack. check_layer() reads them from the tensors.
struct LayerSizes {
  int64_t steps = 0;  // T; stays 0 for a packed batch, where batch_sizes has T
  int64_t batch = 0;  // B
  int64_t rows = 0;   // T * B, or sum(batch_sizes)
  int64_t input_size = 0, hidden_size = 0;
  int64_t proj_size = 0;  // 0: no projection
  int64_t num_layers = 1;
  WeightLayout weights;  // of one layer
  int64_t directions() const { return weights.directions; }
  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }
};

struct LayerOutputs {
  Tensor output, h_n;       // in a single step both are the same tensor
  Tensor c_n;               // h_n again where the cell has no c
  OptionalTensor gates, c;  // saved for backward: the activated gates and the c of every row
};

// The results of forward that backward reads. In a single step `output` is the RNN's h_n; other cells have null there.
struct Saved {
  const OptionalTensor &output, &gates, &c;
};

// The gradients that come into backward; null: zeros.
struct OutputGradients {
  const OptionalTensor &output, &h_n, &c_n;
};

// Which gradients the caller wants.
struct Needs {
  bool input, states, weights;
};

// The gradients that backward computes. A gradient that nobody needs is an empty tensor.
struct LayerGradients {
  Tensor input, hx;
  Tensor cx;  // hx again where the cell has no c
  Tensors weights;
};

// `save`: whether backward will follow.
LayerOutputs forward_layer(const LayerInputs& in, bool save);

// Runs a stack of layers and saves nothing. The input of a later layer is the output of the layer before it. `in` has
// the weights and states of all layers.
LayerOutputs forward_stack(const LayerInputs& in, int64_t num_layers);

LayerGradients backward_layer(const LayerInputs& in, const OutputGradients& grads, const Saved& saved, Needs needs);

}  // namespace rnnfast
