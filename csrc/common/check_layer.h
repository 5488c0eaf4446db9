// Checks of all arguments of an operator. The CPU and CUDA share them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "common/check.h"
#include "common/layers.h"
#include "common/weights.h"

namespace rnnfast {

// Checks the number of weights. `num_layers`: the layers of a stack.
inline WeightLayout check_weight_count(const LayerInputs& in, int64_t num_layers) {
  const int64_t total = int64_t(in.weights.size());
  RNNFAST_REQUIRE(num_layers > 0 && total % num_layers == 0, "weights: expected as many for each of ", num_layers,
                  " layers, got ", total);
  const int64_t per_layer = total / num_layers;
  const auto layout = layout_of(in.cell, per_layer, per_layer == 4 && in.weights[2].dim() == 2);
  RNNFAST_REQUIRE(layout, "weights: expected 2 or 4 tensors per direction (3 or 5 with an LSTM's projection), got ",
                  total);
  return *layout;
}

// Checks the shape of every weight. `sizes` has the sizes of the first layer; they give the shapes of all layers.
inline void check_weight_shapes(const LayerInputs& in, const Facts& input, const LayerSizes& sizes) {
  const WeightLayout& layout = sizes.weights;
  const int64_t gate_rows = gate_count(in.cell) * sizes.hidden_size, output_size = sizes.output_size();
  int64_t i = 0;
  for (int64_t direction = 0; direction < sizes.num_layers * layout.directions; ++direction) {
    const int64_t width = direction < layout.directions ? sizes.input_size : layout.directions * output_size;
    for (int64_t place = 0; place < layout.count; ++place, ++i) {
      const auto check = [&](std::initializer_list<int64_t> expected) {
        check_like(in.weights[size_t(i)], expected, in.input, input, {"weights", i});
      };
      switch (layout.role[size_t(place)]) {
        case WeightRole::kWeightIh:
          check({gate_rows, width});
          break;
        case WeightRole::kWeightHh:
          check({gate_rows, output_size});
          break;
        case WeightRole::kBiasIh:
        case WeightRole::kBiasHh:
          check({gate_rows});
          break;
        case WeightRole::kWeightHr:
          check({sizes.proj_size, sizes.hidden_size});
          break;
      }
    }
  }
}

// Checks a state or its gradient: [B, size] in a single step, else [layers * directions, B, size]. It may be null.
inline void check_state(const OptionalTensor& state, int64_t size, const LayerInputs& in, const Facts& input,
                        const LayerSizes& sizes, Name name) {
  if (!state) return;
  in.single_step
      ? check_like(*state, {sizes.batch, size}, in.input, input, name)
      : check_like(*state, {sizes.num_layers * sizes.directions(), sizes.batch, size}, in.input, input, name);
}

// Checks the arguments that forward and backward share. Batch sizes and lengths are left to the functions below, which
// read their values. `num_layers`: the layers of a stack.
inline LayerSizes check_layer(const LayerInputs& in, int64_t num_layers = 1) {
  const bool packed = in.rows.batch_sizes.has_value();
  RNNFAST_REQUIRE(!packed || !in.rows.lengths, "batch_sizes and lengths: expected at most one of them, got both");
  const Facts input(in.input);
  const int64_t dims = packed || in.single_step ? 2 : 3;
  RNNFAST_REQUIRE(input.dim == dims, "input: expected ", dims, " dimensions, got shape ", shape_text(in.input));
  check_memory(in.input, input, {"input"});

  LayerSizes sizes{.num_layers = num_layers, .weights = check_weight_count(in, num_layers)};
  const LayerWeights weights(sizes.weights, in.weights);
  const Facts weight_ih(weights.weight_ih(0)), weight_hh(weights.weight_hh(0));
  const int gates = gate_count(in.cell);
  RNNFAST_REQUIRE(weight_ih.dim == 2 && weight_ih.sizes[0] % gates == 0, "weight_ih: expected shape [", gates,
                  " * hidden_size, input_size], got ", shape_text(weights.weight_ih(0)));
  RNNFAST_REQUIRE(weight_hh.dim == 2, "weights[1]: expected 2 dimensions, got shape ",
                  shape_text(weights.weight_hh(0)));

  sizes.hidden_size = weight_ih.sizes[0] / gates;
  sizes.input_size = input.sizes[dims - 1];
  sizes.steps = packed ? 0 : in.single_step ? 1 : input.sizes[0];
  sizes.rows = packed || in.single_step ? input.sizes[0] : input.sizes[0] * input.sizes[1];
  RNNFAST_REQUIRE(!packed || in.hx, "hx: expected a tensor with batch_sizes, got None");
  RNNFAST_REQUIRE(!in.hx || in.hx->dim() == (in.single_step ? 2 : 3), "hx: expected ",
                  in.single_step ? "[batch, size]" : "[layers * directions, batch, size]", ", got ",
                  shape_text(*in.hx));
  sizes.proj_size = !weights.is_projected() ? 0 : in.hx ? in.hx->size(2) : weight_hh.sizes[1];
  sizes.batch = packed ? in.hx->size(1) : input.sizes[dims - 2];
  RNNFAST_REQUIRE(packed || sizes.steps > 0, "input: expected at least one time step, got shape ",
                  shape_text(in.input));
  RNNFAST_REQUIRE(sizes.hidden_size > 0 && sizes.output_size() > 0 && sizes.input_size > 0,
                  "expected input_size, hidden_size and proj_size above zero, got input ", shape_text(in.input),
                  ", weight_ih ", shape_text(weights.weight_ih(0)), ", weight_hh ", shape_text(weights.weight_hh(0)));

  check_weight_shapes(in, input, sizes);
  check_state(in.hx, sizes.output_size(), in, input, sizes, {"hx"});
  check_state(in.cx, sizes.hidden_size, in, input, sizes, {"cx"});
  return sizes;
}

// The values of an integer tensor on the CPU. `tensor` keeps their memory alive.
struct HostValues {
  Tensor tensor;
  const int64_t* data;
  int64_t count;
};

// Checks batch_sizes and its values.
inline HostValues check_batch_sizes(const Tensor& batch_sizes, const LayerSizes& sizes) {
  RNNFAST_REQUIRE(batch_sizes.is_cpu() && batch_sizes.scalar_type() == torch::headeronly::ScalarType::Long &&
                      batch_sizes.dim() == 1,
                  "batch_sizes: expected a one-dimensional int64 tensor on the CPU");
  check_memory(batch_sizes, Facts(batch_sizes), {"batch_sizes"});
  HostValues values{torch::stable::contiguous(batch_sizes), nullptr, batch_sizes.numel()};
  values.data = static_cast<const int64_t*>(values.tensor.const_data_ptr());
  int64_t total = 0, limit = sizes.batch;
  for (int64_t t = 0; t < values.count; ++t) {
    const int64_t size = values.data[t];
    RNNFAST_REQUIRE(size > 0 && size <= limit, "batch_sizes: expected positive sizes in descending order, at most ",
                    sizes.batch, ", got ", size);
    limit = size;
    total += size;
  }
  const int64_t first = values.count ? values.data[0] : 0;
  RNNFAST_REQUIRE((values.count == 0 || first == sizes.batch) && total == sizes.rows,
                  "batch_sizes: expected the first to be the batch of hx (", sizes.batch,
                  ") and their sum to be the rows of input (", sizes.rows, "), got ", first, " and ", total);
  return values;
}

// Checks the shape and dtype of lengths, not the values, which may be on a GPU.
inline void check_lengths(const Tensor& lengths, const LayerSizes& sizes) {
  using torch::headeronly::ScalarType;
  check_shape(lengths, {sizes.batch}, {"lengths"});
  const ScalarType type = lengths.scalar_type();
  RNNFAST_REQUIRE(type == ScalarType::Long || type == ScalarType::Int, "lengths: expected int32 or int64, got ",
                  toString(type));
}

// Checks the values of lengths, [B], which must be in the CPU's memory.
template <class Integer>
void check_length_values(const Integer* lengths, const LayerSizes& sizes) {
  for (int64_t b = 0; b < sizes.batch; ++b)
    RNNFAST_REQUIRE(lengths[b] >= 0 && lengths[b] <= sizes.steps, "lengths: expected values from 0 to ", sizes.steps,
                    ", got ", lengths[b]);
}

// Checks the arguments that only backward has. `c_type` is the dtype of the saved c.
inline void check_backward(const LayerInputs& in, const LayerSizes& sizes, const OutputGradients& grads,
                           const Saved& saved, torch::headeronly::ScalarType c_type) {
  const Facts input(in.input);
  const int64_t width = sizes.directions() * sizes.output_size();
  const auto check_output = [&](const OptionalTensor& tensor, Name name) {
    if (!tensor) return;
    input.dim == 2 ? check_like(*tensor, {sizes.rows, width}, in.input, input, name)
                   : check_like(*tensor, {sizes.steps, sizes.batch, width}, in.input, input, name);
  };
  check_output(saved.output, {"output"});
  check_output(grads.output, {"grad_output"});
  check_state(grads.h_n, sizes.output_size(), in, input, sizes, {"grad_h_n"});
  check_state(grads.c_n, sizes.hidden_size, in, input, sizes, {"grad_c_n"});
  const auto check_saved = [&](const OptionalTensor& tensor, int64_t planes, torch::headeronly::ScalarType type,
                               Name name) {
    if (!tensor) return;
    const Facts facts(*tensor);
    check_shape(*tensor, facts, {sizes.directions(), sizes.rows, planes * sizes.hidden_size}, name);
    RNNFAST_REQUIRE(facts.device_type == input.device_type && facts.device_index == input.device_index &&
                        tensor->is_contiguous() && tensor->scalar_type() == type,
                    name.str(), ": expected what forward returned, in dtype ", toString(type));
  };
  check_saved(saved.gates, saved_planes(in.cell), in.input.scalar_type(), {"saved_0"});
  check_saved(saved.c, 1, c_type, {"saved_1"});
}

}  // namespace rnnfast
