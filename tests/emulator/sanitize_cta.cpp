// sanitize_cta CELL H P T B ROWS SEED: forward and backward of tier CTA once, in bfloat16 and in exact float, on arrays
// of exactly the needed size. It is a program, so ASan and TSan builds of it can run. Nobody looks at its results.
// ROWS: "dense", "padded", "packed" or "empty" (padded rows that no sequence has).
#include "cuda/tiers/cta/launch.cuh"
#include "sanitize_layer.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

// One size serves all cells, to build fewer kernels.
constexpr int kHidden = 64;

template <Arithmetic arithmetic, Cell cell, bool kProjected>
void run(const Shape& shape, const Rows& rows) {
  using Forward = CtaForward<arithmetic, cell, kHidden, kProjected>;
  using Backward = CtaBackward<arithmetic, cell, kHidden, kProjected>;
  run_layer<arithmetic>(
      shape, rows,
      [&](const auto& layer) {
        return launch(cta_forward<arithmetic, cell, kHidden, kProjected>, cta_grid(layer), dim3(Forward::kThreads), 1,
                      false, Forward::kSharedBytes, nullptr, layer);
      },
      [&](const auto& layer) {
        return launch(cta_backward<arithmetic, cell, kHidden, kProjected>, cta_grid(layer), dim3(Backward::kThreads), 1,
                      false, Backward::kSharedBytes, nullptr, layer);
      });
}

template <Arithmetic arithmetic>
void run_cell(const Shape& shape, const Rows& rows) {
  if (shape.cell == Cell::kRnn) return run<arithmetic, Cell::kRnn, false>(shape, rows);
  if (shape.cell == Cell::kGru) return run<arithmetic, Cell::kGru, false>(shape, rows);
  is_projected(shape) ? run<arithmetic, Cell::kLstm, true>(shape, rows)
                      : run<arithmetic, Cell::kLstm, false>(shape, rows);
}

}  // namespace

int main(int count, char** words) {
  return sanitize(count, words, [](const Shape& shape, const Rows& rows) {
    run_cell<Arithmetic::kBfloat16>(shape, rows);
    run_cell<Arithmetic::kExact>(shape, rows);
  });
}
