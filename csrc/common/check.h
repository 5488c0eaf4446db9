// Checks of an operator's arguments, before anything is computed or any memory is touched. Every message names what was
// expected and what was given.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/cell.h"

// An operator refuses arguments that it cannot take. rnnfast/ops.py knows a refusal by its first words; only a refusal
// sends a call to torch's own operator.
#define RNNFAST_REQUIRE(condition, ...) STD_TORCH_CHECK(condition, "rnnfast refuses: ", __VA_ARGS__)

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

// What the checks read of a tensor, fetched once: every question to a tensor is a call into libtorch.
struct Facts {
  int64_t dim;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type, device_index;

  explicit Facts(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    int64_t* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &data));
    sizes = data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &data));
    strides = data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }

  bool has_shape(std::initializer_list<int64_t> expected) const {
    return dim == int64_t(expected.size()) && std::equal(expected.begin(), expected.end(), sizes);
  }
};

// A tensor's memory may have been freed or cut (storage.resize_) while its shape stayed.
inline void check_memory(const Tensor& tensor, const Facts& facts, Name name) {
  int64_t offset, bytes, last = 0;
  for (int64_t i = 0; i < facts.dim; ++i) {
    if (facts.sizes[i] == 0) return;
    last += (facts.sizes[i] - 1) * facts.strides[i];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t expected = (offset + last + 1) * int64_t(tensor.element_size());
  RNNFAST_REQUIRE(bytes >= expected, name.str(), ": expected ", expected, " bytes of memory, got ", bytes);
}

inline void check_shape(const Tensor& tensor, const Facts& facts, std::initializer_list<int64_t> expected, Name name) {
  if (facts.has_shape(expected)) return check_memory(tensor, facts, name);
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  RNNFAST_REQUIRE(false, name.str(), ": expected shape [", text, "], got ", shape_text(tensor));
}
inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> expected, Name name) {
  check_shape(tensor, Facts(tensor), expected, name);
}

// Shape, memory, and the dtype and device of `input`.
inline void check_like(const Tensor& tensor, std::initializer_list<int64_t> expected, const Tensor& input,
                       const Facts& like, Name name) {
  const Facts facts(tensor);
  RNNFAST_REQUIRE(facts.device_type == like.device_type && facts.device_index == like.device_index, name.str(),
                  ": expected the device of input");
  RNNFAST_REQUIRE(facts.dtype == like.dtype, name.str(), ": expected the dtype of input (",
                  toString(input.scalar_type()), "), got ", toString(tensor.scalar_type()));
  check_shape(tensor, facts, expected, name);
}

// Sizes of a layer, or of the first of a stack, read off its tensors and checked against each other.
struct LayerSizes {
  int64_t steps, batch;  // steps: 0 for packed input
  int64_t rows;          // T * B, or sum(batch_sizes)
  int64_t input_size, hidden_size, proj_size, directions;
  int64_t num_layers;
  int64_t weights_per_direction;
  bool has_biases;
  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }
};

// The arguments of an operator that forward and backward share; see rnnfast/ops.py.
struct LayerInputs {
  Cell cell;
  bool relu;
  bool step;  // a cell's one step: input [B, I] and states [B, H] in place of [T, B, I] and [D, B, Hout]
  const Tensor& input;
  const std::optional<Tensor>&hx, &cx;  // null: zeros
  const std::vector<Tensor>& weights;
  const std::optional<Tensor>&batch_sizes, &lengths;
};

// num_layers: of a stack, where each layer has the output of the one before it as its input, and `in` the weights and
// states of all.
inline LayerSizes check_layer(const LayerInputs& in, int64_t num_layers = 1) {
  const Tensor& input = in.input;
  const std::vector<Tensor>& weights = in.weights;
  const bool packed = in.batch_sizes.has_value();
  RNNFAST_REQUIRE(!packed || !in.lengths, "batch_sizes and lengths: expected at most one of them, got both");
  const Facts x(input);
  const int64_t dims = packed || in.step ? 2 : 3;
  RNNFAST_REQUIRE(x.dim == dims, "input: expected ", dims, " dimensions, got shape ", shape_text(input));
  check_memory(input, x, {"input"});

  // Biases are vectors, so four weights are one direction with biases or two without.
  const int64_t total = int64_t(weights.size()), most = in.cell == Cell::kLstm ? 5 : 4;
  RNNFAST_REQUIRE(num_layers > 0 && total % num_layers == 0, "weights: expected as many for each of ", num_layers,
                  " layers, got ", total);
  const int64_t count = total / num_layers;
  const int64_t directions = count > 5 || (count == 4 && weights[2].dim() == 2) ? 2 : 1, each = count / directions;
  RNNFAST_REQUIRE(count % directions == 0 && each >= 2 && each <= most && (each != 3 || in.cell == Cell::kLstm),
                  "weights: expected 2 or 4 tensors per direction (3 or 5 with an LSTM's projection), got ", total);
  const bool projected = each % 2 == 1;
  const Facts weight_ih(weights[0]), weight_hh(weights[1]);
  RNNFAST_REQUIRE(weight_ih.dim == 2 && weight_ih.sizes[0] % gate_count(in.cell) == 0, "weight_ih: expected shape [",
                  gate_count(in.cell), " * hidden_size, input_size], got ", shape_text(weights[0]));
  RNNFAST_REQUIRE(weight_hh.dim == 2, "weights[1]: expected 2 dimensions, got shape ", shape_text(weights[1]));

  LayerSizes sizes{};
  sizes.directions = directions;
  sizes.num_layers = num_layers;
  sizes.weights_per_direction = each;
  sizes.has_biases = each >= 4;
  sizes.hidden_size = weight_ih.sizes[0] / gate_count(in.cell);
  sizes.input_size = x.sizes[dims - 1];
  sizes.steps = packed ? 0 : in.step ? 1 : x.sizes[0];
  sizes.rows = packed || in.step ? x.sizes[0] : x.sizes[0] * x.sizes[1];
  RNNFAST_REQUIRE(!packed || in.hx, "hx: expected a tensor with batch_sizes, got None");
  RNNFAST_REQUIRE(!in.hx || in.hx->dim() == (in.step ? 2 : 3), "hx: expected ",
                  in.step ? "[batch, size]" : "[layers * directions, batch, size]", ", got ", shape_text(*in.hx));
  sizes.proj_size = !projected ? 0 : in.hx ? in.hx->size(2) : weight_hh.sizes[1];
  sizes.batch = packed ? in.hx->size(1) : x.sizes[dims - 2];
  RNNFAST_REQUIRE(packed || sizes.steps > 0, "input: expected at least one time step, got shape ", shape_text(input));
  RNNFAST_REQUIRE(sizes.hidden_size > 0 && sizes.output_size() > 0 && sizes.input_size > 0,
                  "expected input_size, hidden_size and proj_size above zero, got input ", shape_text(input),
                  ", weight_ih ", shape_text(weights[0]), ", weight_hh ", shape_text(weights[1]));

  const int64_t gate_rows = weight_ih.sizes[0];
  for (int64_t i = 0; i < total; ++i) {
    const Name name{"weights", i};
    const int64_t kind = i % each;
    if (kind == 0)
      check_like(weights[i], {gate_rows, i < count ? sizes.input_size : directions * sizes.output_size()}, input, x,
                 name);
    else if (kind == 1)
      check_like(weights[i], {gate_rows, sizes.output_size()}, input, x, name);
    else if (projected && kind == each - 1)
      check_like(weights[i], {sizes.proj_size, sizes.hidden_size}, input, x, name);
    else
      check_like(weights[i], {gate_rows}, input, x, name);
  }
  const auto check_state = [&](const std::optional<Tensor>& state, int64_t size, Name name) {
    if (!state) return;
    in.step ? check_like(*state, {sizes.batch, size}, input, x, name)
            : check_like(*state, {num_layers * directions, sizes.batch, size}, input, x, name);
  };
  check_state(in.hx, sizes.output_size(), {"hx"});
  check_state(in.cx, sizes.hidden_size, {"cx"});
  return sizes;
}

}  // namespace rnnfast
