// One layer with all its directions, forward and backward: what ops_cpu.cpp registers as operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/cell.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

struct Forward {
  Tensor output, h_n, c_n;
  Tensors saved;
};

struct Backward {
  Tensor input, hx, cx;
  Tensors weights;
};

// Arguments as in rnnfast/ops.py; cx is null but for the LSTM.
Forward forward_layer(Cell cell, bool relu, const Tensor& input, const Tensor& hx, const Tensor* cx,
                      const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      bool save);

Backward backward_layer(Cell cell, bool relu, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const Tensor& input, const Tensor& hx, const Tensor* cx,
                        const Tensors& weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                        const Tensor& output, const Tensors& saved, bool need_grad_input, bool need_grad_weights);

}  // namespace rnnfast
