// What the programs for sanitizers share (sanitize_*.cpp): a layer on arrays of exactly the needed size. Nobody looks
// at its numbers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

// Numbers in [-0.5, 0.5), the same at every run.
template <class Element>
std::vector<Element> numbers(int64_t count) {
  static uint32_t state = 1;
  std::vector<Element> values(count);
  for (Element& value : values) {
    state = state * 1664525 + 1013904223;
    value = from_float<Element>(float(state >> 8) / (1 << 24) - 0.5f);
  }
  return values;
}

struct Rows {
  std::vector<int64_t> offsets;
  std::vector<int32_t> lengths;
  int64_t count;

  Rows(const std::string& form, int T, int B) : count(int64_t(T) * B) {
    if (form == "dense") return;
    const bool packed = form == "packed", empty = form == "empty";
    for (int b = 0; b < B; ++b) lengths.push_back(packed ? T - b * (T - 1) / B : empty ? 0 : (b * 7 + 1) % (T + 1));
    if (!packed) return;
    count = 0;
    for (int t = 0; t < T; ++t) {
      offsets.push_back(count);
      for (const int length : lengths) count += t < length;
    }
  }
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// One layer's forward and backward pass.
template <Arithmetic arithmetic>
struct Layers {
  using Element = ElementOf<arithmetic>;
  ForwardLayer<Element> forward;
  BackwardLayer<Element> backward;

  Layers(Shape shape, const Rows& rows) {
    const int64_t H = shape.hidden_size, P = shape.output_size, D = shape.directions, B = shape.batch, N = rows.count;
    const int G = gate_count(shape.cell);
    const bool lstm = shape.cell == Cell::kLstm, projected = is_projected(shape);
    shape.rows = N;
    shape.offsets = rows.offsets.empty() ? nullptr : rows.offsets.data();
    shape.lengths = rows.lengths.empty() ? nullptr : rows.lengths.data();
    c_.resize(lstm ? D * N * H : 0);

    forward = {shape};
    for (int d = 0; d < D; ++d)
      forward.weights[d] = {make(G * H * P), make(P * H, projected), make(H, shape.cell == Cell::kGru)};
    forward.hx = make(D * B * P), forward.cx = make(D * B * H, lstm);
    forward.gates_x = make(D * N * G * H);
    forward.output = make(N * D * P), forward.h_n = make(D * B * P), forward.c_n = make(D * B * H, lstm);
    forward.gates = make(D * N * 4 * H, shape.cell != Cell::kRnn), forward.c = lstm ? c_.data() : nullptr;

    backward = {shape};
    for (int d = 0; d < D; ++d) backward.weights[d] = forward.weights[d];
    backward.hx = forward.hx, backward.cx = forward.cx, backward.output = forward.output;
    backward.gates = forward.gates, backward.c = forward.c;
    backward.grad_output = make(N * D * P), backward.grad_h_n = make(D * B * P);
    backward.grad_c_n = make(D * B * H, lstm);
    backward.grad_gates = make(D * N * grad_planes(shape.cell) * H);
    backward.grad_projected = make(D * N * P, projected);
    backward.grad_hx = make(D * B * P), backward.grad_cx = make(D * B * H, lstm);
  }

 private:
  Element* make(int64_t count, bool exists = true) {
    return exists ? kept_.emplace_back(numbers<Element>(count)).data() : nullptr;
  }

  std::vector<std::vector<Element>> kept_;
  std::vector<float> c_;
};

// Forward and backward of a layer once, by launch(layer) -> error.
template <Arithmetic arithmetic, class Forward, class Backward>
void run_layer(const Shape& shape, const Rows& rows, Forward launch_forward, Backward launch_backward) {
  const Layers<arithmetic> layers(shape, rows);
  check(launch_forward(layers.forward));
  check(launch_backward(layers.backward));
}

// main() of `program CELL H P T B ROWS SEED`: run(shape, rows).
template <class Run>
int sanitize(int count, char** words, Run run) {
  if (count != 8) return 2;
  const int cell = std::atoi(words[1]), H = std::atoi(words[2]), P = std::atoi(words[3]), T = std::atoi(words[4]);
  const int B = std::atoi(words[5]);
  rnnfast::emulator::configure({.seed = std::strtoull(words[7], nullptr, 10)});
  const Shape shape{.cell = Cell(cell), .hidden_size = H, .output_size = P, .steps = T, .batch = B, .directions = 2};
  try {
    const Rows rows(words[6], T, B);
    run(shape, rows);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace rnnfast::cuda
