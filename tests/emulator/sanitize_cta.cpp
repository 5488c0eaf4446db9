// sanitize_cta CELL H P T B ROWS SEED: forward and backward of tier CTA once, in bfloat16 and in exact float, on arrays
// of exactly the size that they need. A program of its own, so that ASan and TSan builds of it can run; it computes
// nothing that anybody looks at. ROWS: "dense", "padded", "packed" or "empty", padded rows that no sequence has.
#include "cuda/tiers/cta/launch.cuh"
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
  run_layer<product>(
      shape, rows,
      [&](const auto& layer) {
        return launch(cta_forward<product, cell, kHidden, kProjected>, cta_grid(layer), dim3(Forward::kThreads), 1,
                      false, Forward::kSharedBytes, nullptr, layer);
      },
      [&](const auto& layer) {
        return launch(cta_backward<product, cell, kHidden, kProjected>, cta_grid(layer), dim3(Backward::kThreads), 1,
                      false, Backward::kSharedBytes, nullptr, layer);
      });
}

template <Product product>
void run_cell(const Shape& shape, const Rows& rows) {
  if (shape.cell == Cell::kRnn) return run<product, Cell::kRnn, false>(shape, rows);
  if (shape.cell == Cell::kGru) return run<product, Cell::kGru, false>(shape, rows);
  is_projected(shape) ? run<product, Cell::kLstm, true>(shape, rows) : run<product, Cell::kLstm, false>(shape, rows);
}

}  // namespace

int main(int count, char** words) {
  return sanitize(count, words, [](const Shape& shape, const Rows& rows) {
    run_cell<Product::kBfloat16>(shape, rows);
    run_cell<Product::kExact>(shape, rows);
  });
}
