// Checks of an op's arguments, before any memory is touched: every message names what was expected and what was given.
// The Python layer has already raised torch's own errors; these guard direct calls of torch.ops.rnnfast.*.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cell.h"

namespace rnnfast {

using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// What a message calls a tensor; weights are named by their place, and only when something is wrong.
struct Name {
  const char* text;
  int64_t index = -1;
  std::string str() const {
    return index < 0 ? std::string(text) : std::string(text).append("[").append(std::to_string(index)).append("]");
  }
};

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> expected, Name name) {
  bool same = tensor.dim() == int64_t(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) same = same && tensor.size(i++) == size;
  if (same) return;
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, name.str(), ": expected shape [", text, "], got ", shape_text(tensor));
}

inline void check_like(const Tensor& tensor, const Tensor& input, Name name) {
  STD_TORCH_CHECK(tensor.is_cpu() == input.is_cpu() && tensor.get_device_index() == input.get_device_index(),
                  name.str(), ": expected the device of input");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name.str(), ": expected the dtype of input (",
                  toString(input.scalar_type()), "), got ", toString(tensor.scalar_type()));
}

// Sizes of one layer, read off its tensors and checked against each other.
struct LayerSizes {
  int64_t steps, batch;  // steps: 0 for packed input
  int64_t rows;          // T * B, or sum(batch_sizes)
  int64_t input_size, hidden_size, proj_size, directions;
  int64_t weights_per_direction;
  bool has_biases;
  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }
};

inline LayerSizes check_layer(Cell cell, const Tensor& input, const Tensor& hx, const Tensor* cx,
                              const std::vector<Tensor>& weights, const std::optional<Tensor>& batch_sizes,
                              const std::optional<Tensor>& lengths) {
  STD_TORCH_CHECK(!batch_sizes || !lengths, "batch_sizes and lengths: expected at most one of them, got both");
  const int64_t dims = batch_sizes ? 2 : 3;
  STD_TORCH_CHECK(input.dim() == dims, "input: expected ", dims, " dimensions, got shape ", shape_text(input));
  STD_TORCH_CHECK(hx.dim() == 3 && (hx.size(0) == 1 || hx.size(0) == 2),
                  "hx: expected shape [1 or 2 directions, batch, size], got ", shape_text(hx));
  LayerSizes sizes{};
  sizes.directions = hx.size(0);
  sizes.batch = hx.size(1);
  sizes.input_size = input.size(dims - 1);
  sizes.steps = batch_sizes ? 0 : input.size(0);
  sizes.rows = batch_sizes ? input.size(0) : input.size(0) * input.size(1);
  STD_TORCH_CHECK(batch_sizes || sizes.steps > 0, "input: expected at least one time step, got shape ",
                  shape_text(input));
  if (!batch_sizes) check_shape(input, {input.size(0), sizes.batch, sizes.input_size}, {"input"});

  const int64_t count = int64_t(weights.size());
  const int64_t each = count / sizes.directions;
  STD_TORCH_CHECK(count % sizes.directions == 0 && each >= 2 && each <= (cell == Cell::kLstm ? 5 : 4) &&
                      (each != 3 || cell == Cell::kLstm),
                  "weights: expected 2 or 4 tensors per direction (3 or 5 with an LSTM's projection), got ", count,
                  " for ", sizes.directions, " direction(s)");
  sizes.weights_per_direction = each;
  sizes.has_biases = each >= 4;
  const bool projected = each % 2 == 1;
  STD_TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) % gate_count(cell) == 0, "weight_ih: expected shape [",
                  gate_count(cell), " * hidden_size, input_size], got ", shape_text(weights[0]));
  sizes.hidden_size = weights[0].size(0) / gate_count(cell);
  sizes.proj_size = projected ? hx.size(2) : 0;
  STD_TORCH_CHECK(sizes.hidden_size > 0 && sizes.output_size() > 0 && sizes.input_size > 0,
                  "expected input_size, hidden_size and proj_size above zero, got input ", shape_text(input), ", hx ",
                  shape_text(hx), ", weight_ih ", shape_text(weights[0]));

  check_shape(hx, {sizes.directions, sizes.batch, sizes.output_size()}, {"hx"});
  check_like(hx, input, {"hx"});
  if (cx) {
    check_shape(*cx, {sizes.directions, sizes.batch, sizes.hidden_size}, {"cx"});
    check_like(*cx, input, {"cx"});
  }
  const int64_t gate_rows = gate_count(cell) * sizes.hidden_size;
  for (int64_t i = 0; i < count; ++i) {
    const Name name{"weights", i};
    const int64_t kind = i % each;
    check_like(weights[i], input, name);
    if (kind == 0)
      check_shape(weights[i], {gate_rows, sizes.input_size}, name);
    else if (kind == 1)
      check_shape(weights[i], {gate_rows, sizes.output_size()}, name);
    else if (projected && kind == each - 1)
      check_shape(weights[i], {sizes.proj_size, sizes.hidden_size}, name);
    else
      check_shape(weights[i], {gate_rows}, name);
  }
  return sizes;
}

}  // namespace rnnfast
