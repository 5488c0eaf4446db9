// sanitize_group CELL H P T B ROWS SEED MEMBERS: forward and backward of tier group once, in bfloat16 and in exact
// float, on arrays of exactly the needed size. It is a program, so ASan and TSan builds of it can run. Nobody looks at
// its results. ROWS: "dense", "padded" or "packed". MEMBERS: "all"; or "forward" or "backward" for a launch of that
// pass in which the last CTA of every group never runs.
#include <cstdio>
#include <cstdlib>

#include "cuda/tiers/group/launch.cuh"
#include "sanitize_layer.h"

namespace {

using namespace rnnfast::cuda;
using rnnfast::Cell;

// One size serves all cells, to build fewer kernels. Two warps, because TSan allows some 8000 threads. With a
// projection, H may be so large that some members' units lie beyond the padded P.
constexpr int kHidden = 64, kProjectedHidden = 128, kProjection = 64, kWarps = 2;

// As launch_groups() does it, with `missing` members fewer.
template <class Traits, class Layer>
void run_groups(void (*kernel)(Layer, unsigned char*, int), const Layer& layer, int missing) {
  const GroupResources resources = group_resources<Traits>(layer);
  std::vector<uint4> exchange(resources.exchange_bytes / sizeof(uint4));
  if (missing == 0) return check(launch_groups<Traits>(kernel, layer, exchange.data(), nullptr));
  std::fill(exchange.begin(), exchange.end(), uint4{kMissing, kMissing, kMissing, kMissing});
  const dim3 grid(unsigned(resources.members - missing), unsigned(group_count(layer)));
  check(launch(kernel, grid, dim3(resources.threads), 1, true, resources.shared_bytes, nullptr, layer,
               reinterpret_cast<unsigned char*>(exchange.data()), 0));
}

template <Arithmetic arithmetic, Cell cell, int kH, int kP>
void run(const Shape& shape, const Rows& rows, const std::string& members) {
  const Layers<arithmetic> layers(shape, rows);
  if (members != "backward")
    run_groups<GroupForward<arithmetic, cell, kH, kP, kWarps>>(group_forward<arithmetic, cell, kH, kP, kWarps>,
                                                               layers.forward, members == "forward");
  run_groups<GroupBackward<arithmetic, cell, kH, kP, kWarps>>(group_backward<arithmetic, cell, kH, kP, kWarps>,
                                                              layers.backward, members == "backward");
}

template <Arithmetic arithmetic>
void run_cell(const Shape& shape, const Rows& rows, const std::string& members) {
  if (shape.cell == Cell::kRnn) return run<arithmetic, Cell::kRnn, kHidden, 0>(shape, rows, members);
  if (shape.cell == Cell::kGru) return run<arithmetic, Cell::kGru, kHidden, 0>(shape, rows, members);
  if (is_projected(shape)) return run<arithmetic, Cell::kLstm, kProjectedHidden, kProjection>(shape, rows, members);
  run<arithmetic, Cell::kLstm, kHidden, 0>(shape, rows, members);
}

}  // namespace

int main(int count, char** words) {
  if (count != 9) return 2;
  const int cell = std::atoi(words[1]), H = std::atoi(words[2]), P = std::atoi(words[3]), T = std::atoi(words[4]);
  const int B = std::atoi(words[5]);
  rnnfast::emulator::configure({.seed = std::strtoull(words[7], nullptr, 10)});
  const Shape shape{.cell = Cell(cell), .hidden_size = H, .output_size = P, .steps = T, .batch = B, .directions = 2};
  try {
    const Rows rows(words[6], T, B);
    run_cell<Arithmetic::kBfloat16>(shape, rows, words[8]);
    run_cell<Arithmetic::kExact>(shape, rows, words[8]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
