// Launches of tier group: which of the compiled kernels serves a shape. For instance.cu and tests.
#pragma once

#include "cuda/tiers/group/backward.cuh"

namespace rnnfast::cuda {

constexpr int kGroupWarps = 8;  // two per scheduler of an SM, each with up to 255 registers per lane

// The padded H of the kernels that exist. Few: a kernel takes seconds to compile per architecture.
constexpr int group_padded_hidden(int hidden) {
  return hidden <= 256 ? 256 : hidden <= 512 ? 512 : hidden <= 1024 ? round_up(hidden, 256) : round_up(hidden, 512);
}

// Calls use.template operator()<cell, kHidden, kProjection>() for the kernel that serves `shape`, a layer with a
// projection. A CTA's weights grow with 4 P + H in forward, with 4 H + P in backward; sizes follow the larger part.
// They are few: each costs 0.6 s (backward 0.9 s) of compilation per architecture.
template <Arithmetic arithmetic, bool kBackward, class Use>
auto with_projected_group_kernel(const Shape& shape, Use use) {
  constexpr int kLargest = group_largest_hidden(arithmetic), kHalf = kLargest / 2, kQuarter = kLargest / 4;
  static_assert(group_largest_projection(arithmetic) == kHalf);
  if constexpr (kBackward) {
    if (shape.hidden_size <= kHalf) return use.template operator()<Cell::kLstm, kHalf, kHalf>();
  } else if (shape.output_size <= kQuarter) {
    return shape.hidden_size <= kHalf ? use.template operator()<Cell::kLstm, kHalf, kQuarter>()
                                      : use.template operator()<Cell::kLstm, kLargest, kQuarter>();
  }
  return use.template operator()<Cell::kLstm, kLargest, kHalf>();
}

// The same for every layer; kProjection is 0 where there is no projection.
template <Arithmetic arithmetic, bool kBackward, class Use>
auto with_group_kernel(const Shape& shape, Use use) {
  const int hidden = group_padded_hidden(shape.hidden_size);
  const auto sizes = [&]<Cell cell>() {
    if constexpr (group_largest_hidden(arithmetic) >= 2048) {
      if (hidden == 2048) return use.template operator()<cell, 2048, 0>();
      if (hidden == 1536) return use.template operator()<cell, 1536, 0>();
    }
    if constexpr (group_largest_hidden(arithmetic) >= 1024) {
      if (hidden == 1024) return use.template operator()<cell, 1024, 0>();
      if (hidden == 768) return use.template operator()<cell, 768, 0>();
    }
    if (hidden == 512) return use.template operator()<cell, 512, 0>();
    return use.template operator()<cell, 256, 0>();
  };
  if (shape.cell == Cell::kRnn) return sizes.template operator()<Cell::kRnn>();
  if (shape.cell == Cell::kGru) return sizes.template operator()<Cell::kGru>();
  if (is_projected(shape)) return with_projected_group_kernel<arithmetic, kBackward>(shape, use);
  return sizes.template operator()<Cell::kLstm>();
}

// A group is a batch tile in one direction.
inline int group_count(const Shape& shape) { return (shape.batch + kColumns - 1) / kColumns * shape.directions; }

template <class Traits>
GroupResources group_resources(const Shape& shape) {
  return {Traits::kThreads, Traits::kSharedBytes, (shape.hidden_size + Traits::kUnits - 1) / Traits::kUnits,
          int64_t(group_count(shape)) * shape.steps * Traits::kStepBytes};
}

// How many groups of a kernel the current device can hold at once.
template <class Layer>
cudaError_t groups_at_once(void (*kernel)(Layer, unsigned char*, int), const GroupResources& resources, int* groups) {
  unsigned resident = 0;
  const cudaError_t error =
      resident_blocks(kernel, dim3(resources.threads), 1, size_t(resources.shared_bytes), &resident);
  *groups = int(resident) / resources.members;
  return error;
}

template <class Traits, class Layer>
cudaError_t group_fits(void (*kernel)(Layer, unsigned char*, int), const Shape& shape, bool* fits) {
  int groups = 0;
  const cudaError_t error = groups_at_once(kernel, group_resources<Traits>(shape), &groups);
  *fits = groups > 0;
  return error;
}

// Runs all groups of a kernel, as many at once as the device holds, unless it does not serve the layer.
template <class Traits, class Layer>
cudaError_t launch_groups(void (*kernel)(Layer, unsigned char*, int), const std::type_identity_t<Layer>& layer,
                          void* exchange, cudaStream_t stream) {
  if (layer.hidden_size > Traits::kLargestHidden || layer.output_size > Traits::kLargestOutput ||
      is_projected(layer) != Traits::kProjected)
    return cudaErrorInvalidConfiguration;
  const GroupResources resources = group_resources<Traits>(layer);
  const dim3 block(resources.threads);
  const int groups = group_count(layer);
  if (groups == 0) return cudaSuccess;
  int at_once = 0;
  cudaError_t error = groups_at_once(kernel, resources, &at_once);
  if (error != cudaSuccess) return error;
  at_once = min_of(at_once, groups);
  if (at_once == 0) return cudaErrorCooperativeLaunchTooLarge;
  if (const int64_t pieces = resources.exchange_bytes / kPieceBytes; pieces > 0) {
    constexpr int64_t kThreads = 256, kBlocks = 1024;  // several per SM of the largest GPU
    const int64_t blocks = (pieces + kThreads - 1) / kThreads;
    error = launch(clear_exchange<uint4>, dim3(unsigned(blocks < kBlocks ? blocks : kBlocks)), dim3(kThreads), 1, false,
                   0, stream, static_cast<uint4*>(exchange), pieces);
  }
  for (int first = 0; first < groups && error == cudaSuccess; first += at_once) {
    const dim3 grid(unsigned(resources.members), unsigned(min_of(at_once, groups - first)));
    error = launch(kernel, grid, block, 1, true, resources.shared_bytes, stream, layer,
                   static_cast<unsigned char*>(exchange), first);
  }
  return error;
}

template <Arithmetic arithmetic>
GroupResources group_forward_resources(const Shape& shape) {
  return with_group_kernel<arithmetic, false>(shape, [&]<Cell cell, int kHidden, int kProjection>() {
    return group_resources<GroupForward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(shape);
  });
}

template <Arithmetic arithmetic>
GroupResources group_backward_resources(const Shape& shape) {
  return with_group_kernel<arithmetic, true>(shape, [&]<Cell cell, int kHidden, int kProjection>() {
    return group_resources<GroupBackward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(shape);
  });
}

template <Arithmetic arithmetic>
cudaError_t group_forward_fits(const Shape& shape, bool* fits) {
  return with_group_kernel<arithmetic, false>(shape, [&]<Cell cell, int kHidden, int kProjection>() {
    return group_fits<GroupForward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(
        group_forward<arithmetic, cell, kHidden, kProjection, kGroupWarps>, shape, fits);
  });
}

template <Arithmetic arithmetic>
cudaError_t group_backward_fits(const Shape& shape, bool* fits) {
  return with_group_kernel<arithmetic, true>(shape, [&]<Cell cell, int kHidden, int kProjection>() {
    return group_fits<GroupBackward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(
        group_backward<arithmetic, cell, kHidden, kProjection, kGroupWarps>, shape, fits);
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_group_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, void* exchange,
                                 cudaStream_t stream) {
  return with_group_kernel<arithmetic, false>(layer, [&]<Cell cell, int kHidden, int kProjection>() {
    return launch_groups<GroupForward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(
        group_forward<arithmetic, cell, kHidden, kProjection, kGroupWarps>, layer, exchange, stream);
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_group_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, void* exchange,
                                  cudaStream_t stream) {
  return with_group_kernel<arithmetic, true>(layer, [&]<Cell cell, int kHidden, int kProjection>() {
    return launch_groups<GroupBackward<arithmetic, cell, kHidden, kProjection, kGroupWarps>>(
        group_backward<arithmetic, cell, kHidden, kProjection, kGroupWarps>, layer, exchange, stream);
  });
}

}  // namespace rnnfast::cuda
