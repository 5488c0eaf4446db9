// The operators of frozen layers: rnnfast/frozen_ops.py has their schemas, cpu/frozen.h the form of the weights.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/layers.h"
#include "cpu/frozen.h"
#include "cpu/host/rows.h"
#include "cpu/host/tensors.h"

namespace rnnfast {
namespace {

using torch::headeronly::ScalarType;

// One call's arguments; `single_step`: a cell's one step, input [B, I] and states [B, H].
struct FrozenInputs {
  Cell cell;
  bool single_step;
  const Tensor& input;
  const OptionalTensor &hx, &cx;
  const Tensor& packed;
  const OptionalTensor &batch_sizes, &lengths;
  int64_t hidden_size, proj_size, num_layers;
  bool bidirectional, wide_activations;
};

struct FrozenOutputs {
  Tensor output, h_n, c_n;
};

constexpr int64_t kPartBytes = 64;  // where every part of a packed block begins
int64_t part_bytes(int64_t bytes) { return (bytes + kPartBytes - 1) / kPartBytes * kPartBytes; }

// Hands out the parts of a packed block in turn.
class Parts {
 public:
  explicit Parts(const char* block) : start_(block), at_(block + sizeof(PackedHeader)) {}

  template <class T>
  const T* take(int64_t count) {
    const char* const part = at_;
    at_ += part_bytes(count * int64_t(sizeof(T)));
    return reinterpret_cast<const T*>(part);
  }
  PackedMatrix matrix(const PackedShape& shape) {
    PackedMatrix matrix{shape, take<char>(shape.panel_bytes())};
    if (shape.format == WeightFormat::kInt8) {
      matrix.scale = take<float>(shape.vectors() * kPackedLanes);
      matrix.sum = take<int32_t>(shape.vectors() * kPackedLanes);
    }
    return matrix;
  }
  int64_t used() const { return at_ - start_; }

 private:
  const char *start_, *at_;
};

// The weights of one direction of one layer.
FrozenDirection direction_of(Parts& parts, const PackedHeader& header, int64_t layer) {
  const Cell cell = Cell(header.cell);
  const WeightFormat format = WeightFormat(header.format);
  const int64_t output_size = header.proj_size ? header.proj_size : header.hidden_size;
  const int64_t input_size = layer == 0 ? header.input_size : header.directions * output_size;
  const int gates = gate_count(cell);
  FrozenDirection direction{};
  direction.ih = parts.matrix({header.hidden_size, input_size, gates, format});
  direction.hh = parts.matrix({header.hidden_size, output_size, gates, format});
  if (header.proj_size) direction.hr = parts.matrix({header.proj_size, header.hidden_size, 1, format});
  direction.bias = parts.take<float>(direction.ih.shape.vectors() * kPackedLanes);
  if (cell == Cell::kGru) direction.bias_hidden = parts.take<float>(direction.ih.shape.unit_vectors() * kPackedLanes);
  return direction;
}

// A packed block comes from a file or from another program: nothing of it is believed before it is checked.
PackedHeader check_packed(const Tensor& packed) {
  const Facts facts(packed);
  RNNFAST_REQUIRE(
      facts.dim == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.is_cpu(),
      "packed: expected a contiguous uint8 vector on the CPU, got shape ", shape_text(packed));
  check_memory(packed, facts, {"packed"});
  const int64_t bytes = facts.sizes[0];
  RNNFAST_REQUIRE(bytes >= int64_t(sizeof(PackedHeader)), "packed: expected at least ", sizeof(PackedHeader),
                  " bytes, got ", bytes);
  PackedHeader header;
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);  // at any address
  RNNFAST_REQUIRE(header.magic == PackedHeader::kMagic, "packed: expected weights packed by this version of rnnfast");
  RNNFAST_REQUIRE(header.bytes == bytes, "packed: expected ", header.bytes, " bytes, got ", bytes);
  constexpr int64_t most = 65535;
  RNNFAST_REQUIRE(header.format >= 0 && header.format <= int64_t(WeightFormat::kInt8) && header.input_size > 0 &&
                      header.input_size <= most && header.hidden_size > 0 && header.hidden_size <= most / 2 &&
                      header.proj_size >= 0 && header.proj_size < header.hidden_size && header.layers > 0 &&
                      header.layers <= most && (header.directions == 1 || header.directions == 2) && header.cell >= 0 &&
                      header.cell <= int64_t(Cell::kLstm) &&
                      (header.proj_size == 0 || Cell(header.cell) == Cell::kLstm),
                  "packed: expected sizes from 1 to ", most, " and at most ", most / 2, " units");
  Parts parts(nullptr);
  for (int64_t k = 0; k < header.layers && parts.used() <= bytes; ++k)
    for (int64_t d = 0; d < header.directions; ++d) direction_of(parts, header, k);
  RNNFAST_REQUIRE(parts.used() == bytes, "packed: expected ", parts.used(), " bytes for its sizes, got ", bytes);
  return header;
}

LayerSizes check_inputs(const FrozenInputs& in, const PackedHeader& header) {
  RNNFAST_REQUIRE(header.cell == int64_t(in.cell) && header.hidden_size == in.hidden_size &&
                      header.proj_size == in.proj_size && header.layers == in.num_layers &&
                      header.directions == (in.bidirectional ? 2 : 1),
                  "packed: expected weights of hidden_size ", in.hidden_size, ", proj_size ", in.proj_size, ", ",
                  in.num_layers, " layers and ", in.bidirectional ? 2 : 1, " directions, got ", header.hidden_size,
                  ", ", header.proj_size, ", ", header.layers, " and ", header.directions);
  const bool packed = in.batch_sizes.has_value();
  RNNFAST_REQUIRE(!packed || !in.lengths, "batch_sizes and lengths: expected at most one of them, got both");
  const Facts x(in.input);
  const int64_t dims = packed || in.single_step ? 2 : 3;
  RNNFAST_REQUIRE(x.dim == dims, "input: expected ", dims, " dimensions, got shape ", shape_text(in.input));
  RNNFAST_REQUIRE(in.input.scalar_type() == ScalarType::Float && in.input.is_cpu(),
                  "input: expected a float32 tensor on the CPU, got ", toString(in.input.scalar_type()));
  check_memory(in.input, x, {"input"});
  RNNFAST_REQUIRE(x.sizes[dims - 1] == header.input_size, "input: expected ", header.input_size,
                  " features, got shape ", shape_text(in.input));
  RNNFAST_REQUIRE(!packed || in.hx, "hx: expected a tensor with batch_sizes, got None");
  RNNFAST_REQUIRE(!packed || in.hx->dim() == 3, "hx: expected 3 dimensions, got shape ", shape_text(*in.hx));
  LayerSizes sizes{};
  sizes.directions = header.directions;
  sizes.num_layers = header.layers;
  sizes.input_size = header.input_size;
  sizes.hidden_size = header.hidden_size;
  sizes.proj_size = header.proj_size;
  sizes.steps = packed ? 0 : in.single_step ? 1 : x.sizes[0];
  sizes.batch = packed ? in.hx->size(1) : x.sizes[dims - 2];
  sizes.rows = packed || in.single_step ? x.sizes[0] : x.sizes[0] * x.sizes[1];
  RNNFAST_REQUIRE(packed || sizes.steps > 0, "input: expected at least one time step, got shape ",
                  shape_text(in.input));
  const auto check_state = [&](const OptionalTensor& state, int64_t size, Name name) {
    if (!state) return;
    in.single_step ? check_like(*state, {sizes.batch, size}, in.input, x, name)
                   : check_like(*state, {sizes.num_layers * sizes.directions, sizes.batch, size}, in.input, x, name);
  };
  check_state(in.hx, sizes.output_size(), {"hx"});
  check_state(in.cx, sizes.hidden_size, {"cx"});
  return sizes;
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

const float* read(const OptionalTensor& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}
float* write(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Where a stack reads its initial states and writes its results. The states may be overwritten in place.
struct StackMemory {
  const float *hx, *cx;  // null: zeros
  float *output, *h_n, *c_n;
};

void run_layers(const Tensor& packed, const PackedHeader& header, const Schedule& schedule, bool wide_activations,
                const float* input, const StackMemory& memory) {
  const bool lstm = Cell(header.cell) == Cell::kLstm;
  const int64_t hidden_size = header.hidden_size, output_size = header.proj_size ? header.proj_size : hidden_size;
  const int64_t width = header.directions * output_size, last = header.layers - 1;
  OptionalTensor between[2];
  for (int64_t k = 0; k < std::min<int64_t>(last, 2); ++k)
    between[k] = empty(ScalarType::Float, {schedule.total, width});
  const int threads = usable_threads();
  std::vector<FrozenCall> layers(size_t(header.layers));
  Parts parts(static_cast<const char*>(packed.const_data_ptr()));
  for (int64_t k = 0; k <= last; ++k) {
    FrozenCall& call = layers[size_t(k)];
    call.shape = {Cell(header.cell), header.relu != 0, k == 0 ? header.input_size : width,
                  hidden_size,       header.proj_size, header.directions};
    call.schedule = &schedule;
    call.threads = threads;
    // One row and one step wait for the weights: 16 bits cost nothing there (Zen 4).
    call.wide_activations = wide_activations || schedule.total == 1;
    call.input = k == 0 ? input : layers[size_t(k - 1)].output;
    call.output = k < last ? write(*between[k % 2]) : memory.output;
    for (int64_t d = 0; d < header.directions; ++d) {
      FrozenDirection& direction = call.direction[d];
      direction = direction_of(parts, header, k);
      const int64_t place = (k * header.directions + d) * schedule.batch;
      direction.hx = memory.hx ? memory.hx + place * output_size : nullptr;
      direction.h_n = memory.h_n + place * output_size;
      if (!lstm) continue;
      direction.cx = memory.cx ? memory.cx + place * hidden_size : nullptr;
      direction.c_n = memory.c_n + place * hidden_size;
    }
  }
  const char* name;
  frozen_kernel(WeightFormat(header.format), &name)(layers.data(), header.layers);
}

FrozenOutputs run(const FrozenInputs& in) {
  const PackedHeader header = check_packed(in.packed);
  const LayerSizes sizes = check_inputs(in, header);
  const Rows rows(sizes, in.batch_sizes, in.lengths);
  const Schedule schedule = rows.schedule();
  const auto state_of = [&](const OptionalTensor& state) -> OptionalTensor {
    if (!state) return std::nullopt;
    const Tensor own = dense(*state);
    return rows.sorted() ? rows.gather(own) : own;
  };
  Tensor x = dense(in.input);
  if (rows.sorted()) x = rows.pack(x);
  const OptionalTensor hx = state_of(in.hx), cx = state_of(in.cx);
  const bool lstm = in.cell == Cell::kLstm;
  const int64_t width = sizes.directions * sizes.output_size(), places = sizes.num_layers * sizes.directions;
  const auto new_state = [&](int64_t size) {
    return in.single_step ? empty(ScalarType::Float, {sizes.batch, size})
                          : empty(ScalarType::Float, {places, schedule.batch, size});
  };
  const bool rows_only = in.batch_sizes || rows.sorted() || in.single_step;
  Tensor output = rows_only ? empty(ScalarType::Float, {schedule.total, width})
                            : empty(ScalarType::Float, {sizes.steps, sizes.batch, width});
  Tensor h_n = new_state(sizes.output_size());
  FrozenOutputs result{output, h_n, lstm ? new_state(sizes.hidden_size) : h_n};

  if (schedule.total == 0) {
    const auto pass = [](Tensor& to, const OptionalTensor& from) {
      from ? torch::stable::copy_(to, *from) : torch::stable::zero_(to);
    };
    pass(result.h_n, hx);
    if (lstm) pass(result.c_n, cx);
  } else {
    run_layers(in.packed, header, schedule, in.wide_activations, read(x),
               {read(hx), read(cx), write(result.output), write(result.h_n), lstm ? write(result.c_n) : nullptr});
  }
  if (rows.sorted()) {
    result.output = rows.unpack(result.output);
    const auto scattered = [&](const Tensor& state, const OptionalTensor& initial) {
      return rows.scatter(state, initial ? OptionalTensor(dense(*initial)) : OptionalTensor());
    };
    result.h_n = scattered(result.h_n, in.hx);
    if (lstm) result.c_n = scattered(result.c_n, in.cx);
  }
  return result;
}

const OptionalTensor kNone;

template <Cell cell>
std::tuple<Tensor, Tensor> one_state(const Tensor& input, const OptionalTensor& hx, const Tensor& packed,
                                     const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                     int64_t hidden_size, int64_t num_layers, bool bidirectional,
                                     bool wide_activations) {
  FrozenOutputs f = run({cell, false, input, hx, kNone, packed, batch_sizes, lengths, hidden_size, 0, num_layers,
                         bidirectional, wide_activations});
  return {std::move(f.output), std::move(f.h_n)};
}

std::tuple<Tensor, Tensor, Tensor> two_states(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                              const Tensor& packed, const OptionalTensor& batch_sizes,
                                              const OptionalTensor& lengths, int64_t hidden_size, int64_t proj_size,
                                              int64_t num_layers, bool bidirectional, bool wide_activations) {
  FrozenOutputs f = run({Cell::kLstm, false, input, hx, cx, packed, batch_sizes, lengths, hidden_size, proj_size,
                         num_layers, bidirectional, wide_activations});
  return {std::move(f.output), std::move(f.h_n), std::move(f.c_n)};
}

template <Cell cell>
Tensor one_state_step(const Tensor& input, const OptionalTensor& hx, const Tensor& packed, int64_t hidden_size,
                      bool wide_activations) {
  return run({cell, true, input, hx, kNone, packed, kNone, kNone, hidden_size, 0, 1, false, wide_activations}).h_n;
}

std::tuple<Tensor, Tensor> two_states_step(const Tensor& input, const OptionalTensor& hx, const OptionalTensor& cx,
                                           const Tensor& packed, int64_t hidden_size, bool wide_activations) {
  FrozenOutputs f =
      run({Cell::kLstm, true, input, hx, cx, packed, kNone, kNone, hidden_size, 0, 1, false, wide_activations});
  return {std::move(f.h_n), std::move(f.c_n)};
}

// One time step of a stack whose states live on: h [layers, B, Hout] and c [layers, B, H] are overwritten.
Tensor stream_step(const Tensor& input, Tensor h, const OptionalTensor& c, const Tensor& packed,
                   bool wide_activations) {
  const PackedHeader header = check_packed(packed);
  const bool lstm = Cell(header.cell) == Cell::kLstm;
  RNNFAST_REQUIRE(header.directions == 1, "a stream: expected one direction, got two");
  RNNFAST_REQUIRE(lstm == c.has_value(), "c: expected a tensor for an LSTM, and for no other cell");
  const Facts x(input);
  RNNFAST_REQUIRE(
      x.dim == 2 && x.sizes[1] == header.input_size && input.scalar_type() == ScalarType::Float && input.is_cpu(),
      "input: expected a float32 tensor [batch, ", header.input_size, "] on the CPU, got shape ", shape_text(input));
  check_memory(input, x, {"input"});
  const int64_t batch = x.sizes[0], output_size = header.proj_size ? header.proj_size : header.hidden_size;
  check_like(h, {header.layers, batch, output_size}, input, x, {"h"});
  if (lstm) check_like(*c, {header.layers, batch, header.hidden_size}, input, x, {"c"});
  RNNFAST_REQUIRE(h.is_contiguous() && (!lstm || c->is_contiguous()), "h and c: expected contiguous tensors");
  Tensor output = empty(ScalarType::Float, {batch, output_size});
  if (batch == 0) return output;
  const int64_t offset = 0;
  const Schedule schedule{1, batch, batch, &batch, &offset};
  const Tensor dense_input = dense(input);
  float* const c_data = lstm ? write(*c) : nullptr;
  run_layers(packed, header, schedule, wide_activations, read(dense_input),
             {write(h), c_data, write(output), write(h), c_data});
  return output;
}

std::string isa_of(int64_t format) {
  RNNFAST_REQUIRE(format >= 0 && format <= int64_t(WeightFormat::kInt8), "format: expected 0, 1 or 2, got ", format);
  const char* name;
  frozen_kernel(WeightFormat(format), &name);
  return name;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  using namespace rnnfast;
  m.impl("rnn_frozen", TORCH_BOX(&one_state<Cell::kRnn>));
  m.impl("gru_frozen", TORCH_BOX(&one_state<Cell::kGru>));
  m.impl("lstm_frozen", TORCH_BOX(&two_states));
  m.impl("rnn_step_frozen", TORCH_BOX(&one_state_step<Cell::kRnn>));
  m.impl("gru_step_frozen", TORCH_BOX(&one_state_step<Cell::kGru>));
  m.impl("lstm_step_frozen", TORCH_BOX(&two_states_step));
  m.impl("_stream_step", TORCH_BOX(&stream_step));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) { m.impl("_frozen_isa", TORCH_BOX(&rnnfast::isa_of)); }
