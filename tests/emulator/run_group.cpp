// Tier group's kernels in the emulator; test_cuda_group.py calls them through ctypes. Small H runs in kernels of 2
// warps per CTA, which are not shipped: their slices of the depth are as small, with few threads.
#include "run_group.h"

#include <vector>

#include "cuda/tiers/group/launch.cuh"
#include "run_layer.h"

namespace rnnfast::cuda {
namespace {

constexpr int kSmallHidden = 128, kSmallProjection = 64, kSmallWarps = 2;

bool is_small(const Shape& shape) { return shape.hidden_size <= kSmallHidden; }

// The exchange of a launch, of exactly its size. Its first content looks like values.
std::vector<uint4> exchange_of(const GroupResources& resources) {
  return std::vector<uint4>(resources.exchange_bytes / sizeof(uint4));
}

// Calls use.template operator()<cell, kProjection>() for the shape's cell.
template <class Use>
auto with_cell(const Shape& shape, Use use) {
  if (shape.cell == Cell::kRnn) return use.template operator()<Cell::kRnn, 0>();
  if (shape.cell == Cell::kGru) return use.template operator()<Cell::kGru, 0>();
  if (is_projected(shape)) return use.template operator()<Cell::kLstm, kSmallProjection>();
  return use.template operator()<Cell::kLstm, 0>();
}

template <Arithmetic arithmetic>
cudaError_t forward(const Shape& shape, void* const* data) {
  const auto layer = forward_layer<arithmetic>(shape, data);
  if (!is_small(shape))
    return launch_group_forward<arithmetic>(layer, exchange_of(group_forward_resources<arithmetic>(shape)).data(),
                                            nullptr);
  return with_cell(shape, [&]<Cell cell, int kProjection>() {
    using Traits = GroupForward<arithmetic, cell, kSmallHidden, kProjection, kSmallWarps>;
    return launch_groups<Traits>(group_forward<arithmetic, cell, kSmallHidden, kProjection, kSmallWarps>, layer,
                                 exchange_of(group_resources<Traits>(shape)).data(), nullptr);
  });
}

template <Arithmetic arithmetic>
cudaError_t backward(const Shape& shape, void* const* data) {
  const auto layer = backward_layer<arithmetic>(shape, data);
  if (!is_small(shape))
    return launch_group_backward<arithmetic>(layer, exchange_of(group_backward_resources<arithmetic>(shape)).data(),
                                             nullptr);
  return with_cell(shape, [&]<Cell cell, int kProjection>() {
    using Traits = GroupBackward<arithmetic, cell, kSmallHidden, kProjection, kSmallWarps>;
    return launch_groups<Traits>(group_backward<arithmetic, cell, kSmallHidden, kProjection, kSmallWarps>, layer,
                                 exchange_of(group_resources<Traits>(shape)).data(), nullptr);
  });
}

emulator::Options options;

}  // namespace
}  // namespace rnnfast::cuda

using namespace rnnfast::cuda;

const char* rnnfast_group_forward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() { return forward<kArithmetic>(shape_of(sizes, data), data); };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

const char* rnnfast_group_backward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() { return backward<kArithmetic>(shape_of(sizes, data), data); };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

void rnnfast_group_resources(int arithmetic, const int64_t* sizes, int is_backward, int64_t* result) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  const GroupResources resources = with_arithmetic(arithmetic, [&]<Arithmetic kArithmetic>() {
    return is_backward ? group_backward_resources<kArithmetic>(shape) : group_forward_resources<kArithmetic>(shape);
  });
  result[0] = resources.threads, result[1] = resources.shared_bytes;
  result[2] = resources.members, result[3] = resources.exchange_bytes;
}

void rnnfast_group_seed(uint64_t seed) {
  options.seed = seed;
  rnnfast::emulator::configure(options);
}

void rnnfast_group_device(unsigned resident_blocks) {
  options.resident_blocks = resident_blocks;
  rnnfast::emulator::configure(options);
}
