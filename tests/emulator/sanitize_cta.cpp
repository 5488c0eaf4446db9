// sanitize_cta CELL H P T B ROWS SEED: forward and backward of tier CTA once, in bfloat16 and in exact float, on arrays
// of exactly the size that they need. A program of its own, so that ASan and TSan builds of it can run; it computes
// nothing that anybody looks at. ROWS: "dense", "padded" or "packed".
#include <cstdio>
#include <cstdlib>

#include "cuda/tier_cta_launch.cuh"
#include "sanitize_layer.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

// One size serves all: fewer kernels to build.
constexpr int kHidden = 64;

template <Product product, Cell cell, bool kProjected>
void run(const Shape& shape, const Rows& rows) {
  using Forward = CtaForward<product, cell, kHidden, kProjected>;
  using Backward = CtaBackward<product, cell, kHidden, kProjected>;
  const Layers<product> layers(shape, rows);
  check(launch(cta_forward<product, cell, kHidden, kProjected>, cta_grid(shape), dim3(Forward::kThreads), 1, false,
               Forward::kSharedBytes, nullptr, layers.forward));
  check(launch(cta_backward<product, cell, kHidden, kProjected>, cta_grid(shape), dim3(Backward::kThreads), 1, false,
               Backward::kSharedBytes, nullptr, layers.backward));
}

template <Product product>
void run_cell(const Shape& shape, const Rows& rows) {
  if (shape.cell == Cell::kRnn) return run<product, Cell::kRnn, false>(shape, rows);
  if (shape.cell == Cell::kGru) return run<product, Cell::kGru, false>(shape, rows);
  is_projected(shape) ? run<product, Cell::kLstm, true>(shape, rows) : run<product, Cell::kLstm, false>(shape, rows);
}

}  // namespace

int main(int count, char** words) {
  if (count != 8) return 2;
  const int cell = std::atoi(words[1]), H = std::atoi(words[2]), P = std::atoi(words[3]), T = std::atoi(words[4]);
  const int B = std::atoi(words[5]);
  rnnfast::emulator::configure({.seed = std::strtoull(words[7], nullptr, 10)});
  const Shape shape{.cell = Cell(cell), .hidden_size = H, .output_size = P, .steps = T, .batch = B, .directions = 2};
  try {
    const Rows rows(words[6], T, B);
    run_cell<Product::kBfloat16>(shape, rows);
    run_cell<Product::kExact>(shape, rows);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
