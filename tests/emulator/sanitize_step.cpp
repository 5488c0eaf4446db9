// sanitize_step CELL H P T B ROWS LARGE SEED: forward, with and without saving, and backward of tier step, in bfloat16
// and in exact float, on arrays of exactly the needed size. It is a program, so ASan and TSan builds of it can run.
// Nobody looks at its results. ROWS: "dense", "padded" or "packed". LARGE: 0 or 1.
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/tiers/step/backward.cuh"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

// Arrays of numbers in [-0.5, 0.5), the same at every run. They live as long as this object.
template <class Element>
class Arrays {
 public:
  Element* make(int64_t count, bool exists = true) {
    if (!exists) return nullptr;
    std::vector<Element>& values = kept_.emplace_back(count);
    for (Element& value : values) {
      state_ = state_ * 1664525 + 1013904223;
      value = from_float<Element>(float(state_ >> 8) / (1 << 24) - 0.5f);
    }
    return values.data();
  }
  AlignedWeight<Element> weight(int64_t rows, int64_t k) {
    const int64_t stride = round_up(k, 16 / int64_t(sizeof(Element)));
    return {make(rows * stride), stride};
  }

 private:
  std::deque<std::vector<Element>> kept_;
  uint32_t state_ = 1;
};

bool aligned(const void* data, int64_t bytes) { return std::bit_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0; }

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <Arithmetic arithmetic>
void run(const Shape& shape, bool large) {
  using Element = ElementOf<arithmetic>;
  const int64_t H = shape.hidden_size, P = shape.output_size, D = shape.directions, B = shape.batch, N = shape.rows;
  const int G = rnnfast::gate_count(shape.cell), size = sizeof(Element);
  const bool lstm = shape.cell == Cell::kLstm, projected = P < H;
  Arrays<Element> arrays;
  Arrays<float> wide;

  StepForward<Element> forward{{shape}};
  for (int d = 0; d < D; ++d) {
    forward.weights[d].bias_hn = arrays.make(H, shape.cell == Cell::kGru);
    forward.recurrent[d] = arrays.weight(G * H, P);
    if (projected) forward.projection[d] = arrays.weight(P, H);
  }
  forward.hx = arrays.make(D * B * P), forward.cx = arrays.make(D * B * H, lstm);
  forward.gates_x = arrays.make(D * N * G * H);
  forward.output = arrays.make(N * D * P), forward.h_n = arrays.make(D * B * P);
  forward.c_n = arrays.make(D * B * H, lstm);
  forward.carry = wide.make(D * B * H, lstm);
  forward.unprojected = arrays.make(D * B * H, projected);
  forward.aligned = aligned(forward.output, P * size) && aligned(forward.hx, P * size);
  forward.aligned_unprojected = aligned(forward.unprojected, H * size);
  check(run_step_forward<arithmetic>(std::bit_cast<StepForward<void>>(forward), large, nullptr));
  forward.gates = arrays.make(D * N * 4 * H, shape.cell != Cell::kRnn);
  forward.c = wide.make(D * N * H, lstm);
  check(run_step_forward<arithmetic>(std::bit_cast<StepForward<void>>(forward), large, nullptr));

  StepBackward<Element> backward{{shape}};
  for (int d = 0; d < D; ++d) {
    backward.recurrent[d] = arrays.weight(P, G * H);
    if (projected) backward.projection[d] = arrays.weight(H, P);
  }
  backward.hx = forward.hx, backward.cx = forward.cx, backward.output = forward.output;
  backward.gates = forward.gates, backward.c = forward.c;
  backward.grad_output = arrays.make(N * D * P), backward.grad_h_n = arrays.make(D * B * P);
  backward.grad_c_n = arrays.make(D * B * H, lstm);
  backward.grad_gates = arrays.make(D * N * rnnfast::grad_planes(shape.cell) * H);
  backward.grad_projected = arrays.make(D * N * P, projected);
  backward.grad_hx = arrays.make(D * B * P), backward.grad_cx = arrays.make(D * B * H, lstm);
  backward.carry = wide.make(D * B * H, shape.cell != Cell::kRnn);
  backward.aligned = aligned(backward.grad_gates, H * size);
  backward.aligned_projected = aligned(backward.grad_projected, P * size);
  check(run_step_backward<arithmetic>(std::bit_cast<StepBackward<void>>(backward), large, nullptr));
}

}  // namespace

int main(int count, char** words) {
  if (count != 9) return 2;
  const auto number = [&](int i) { return std::atoi(words[i]); };
  const int T = number(4), B = number(5);
  const std::string form = words[6];
  rnnfast::emulator::configure({.seed = std::strtoull(words[8], nullptr, 10)});
  Shape shape{.cell = Cell(number(1)), .hidden_size = number(2), .output_size = number(3), .steps = T, .batch = B};
  shape.directions = 2;
  shape.rows = int64_t(T) * B;
  std::vector<int32_t> lengths;
  std::vector<int64_t> offsets;
  if (form != "dense") {
    for (int b = 0; b < B; ++b) lengths.push_back(form == "packed" ? T - b * (T - 1) / B : (b * 7 + 1) % (T + 1));
    shape.lengths = lengths.data();
  }
  if (form == "packed") {
    shape.rows = 0;
    for (int t = 0; t < T; ++t) {
      offsets.push_back(shape.rows);
      for (const int length : lengths) shape.rows += t < length;
    }
    shape.offsets = offsets.data();
  }
  try {
    run<Arithmetic::kBfloat16>(shape, number(7) != 0);
    run<Arithmetic::kExact>(shape, number(7) != 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
