// sanitize_cluster CELL H P T B ROWS SEED: forward and backward of tier cluster once, in bfloat16 and in exact float, on arrays
// of exactly the size that they need. A program of its own, so that ASan and TSan builds of it can run; it computes
// nothing that anybody looks at. ROWS: "dense", "padded" or "packed".
#include "cuda/tier_cluster_launch.cuh"
#include "sanitize_layer.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

template <Product product, Cell cell>
void run(const Shape& shape, const Rows& rows) {
  constexpr int kHidden = cluster_tile(product, cell, 1).hidden;  // one size serves all: fewer kernels to build
  using Forward = ClusterForward<product, cell, kHidden>;
  using Backward = ClusterBackward<product, cell, kHidden>;
  run_layer<product>(
      shape, rows,
      [&](const auto& layer) {
        return launch(cluster_forward<product, cell, kHidden>, cluster_grid(layer, Forward::kCtas),
                      dim3(Forward::kThreads), Forward::kCtas, false, Forward::kSharedBytes, nullptr, layer);
      },
      [&](const auto& layer) {
        return launch(cluster_backward<product, cell, kHidden>, cluster_grid(layer, Backward::kCtas),
                      dim3(Backward::kThreads), Backward::kCtas, false, Backward::kSharedBytes, nullptr, layer);
      });
}

template <Product product>
void run_cell(const Shape& shape, const Rows& rows) {
  if (shape.cell == Cell::kRnn) return run<product, Cell::kRnn>(shape, rows);
  shape.cell == Cell::kGru ? run<product, Cell::kGru>(shape, rows) : run<product, Cell::kLstm>(shape, rows);
}

}  // namespace

int main(int count, char** words) {
  return sanitize(count, words, [](const Shape& shape, const Rows& rows) {
    run_cell<Product::kBfloat16>(shape, rows);
    run_cell<Product::kExact>(shape, rows);
  });
}
