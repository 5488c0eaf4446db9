// sanitize_cluster CELL H P T B ROWS SEED: forward and backward of tier cluster once, RNN in exact float and the others
// in bfloat16, on arrays of exactly the needed size. It is a program, so ASan and TSan builds of it can run. Nobody
// looks at its results. ROWS: "dense", "padded" or "packed".
#include "cuda/tiers/cluster/launch.cuh"
#include "sanitize_layer.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

template <Arithmetic arithmetic, Cell cell, bool kProjected = false>
void run(const Shape& shape, const Rows& rows) {
  // One size serves all cells, to build fewer kernels.
  constexpr int kHidden = cluster_tile(arithmetic, cell, 1, kProjected).hidden;
  using Forward = ClusterForward<arithmetic, cell, kHidden, kProjected>;
  using Backward = ClusterBackward<arithmetic, cell, kHidden, kProjected>;
  run_layer<arithmetic>(
      shape, rows,
      [](const auto& layer) {
        return launch_cluster<arithmetic, Forward>(cluster_forward<arithmetic, cell, kHidden, kProjected>, layer,
                                                   nullptr);
      },
      [](const auto& layer) {
        return launch_cluster<arithmetic, Backward>(cluster_backward<arithmetic, cell, kHidden, kProjected>, layer,
                                                    nullptr);
      });
}

}  // namespace

int main(int count, char** words) {
  return sanitize(count, words, [](Shape shape, const Rows& rows) {
    shape.directions = 1;  // clusters of two directions share nothing
    if (shape.cell == Cell::kRnn) return run<Arithmetic::kExact, Cell::kRnn>(shape, rows);
    if (shape.cell == Cell::kGru) return run<Arithmetic::kBfloat16, Cell::kGru>(shape, rows);
    is_projected(shape) ? run<Arithmetic::kBfloat16, Cell::kLstm, true>(shape, rows)
                        : run<Arithmetic::kBfloat16, Cell::kLstm>(shape, rows);
  });
}
