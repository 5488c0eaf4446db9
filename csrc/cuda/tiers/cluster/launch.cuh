// Launches of tier cluster: which of the compiled kernels serves a shape. For instance.cu and tests.
#pragma once

#include "cuda/tiers/cluster/backward.cuh"
#include "cuda/tiers/cluster/forward.cuh"

namespace rnnfast::cuda {

// Calls use.template operator()<cell, kHidden, kProjected>() for the padded H that serves `hidden`.
template <Arithmetic arithmetic, Cell cell, bool kProjected, class Use>
auto with_cluster_size(int hidden, Use use) {
  constexpr int kLargest = cluster_largest_hidden(arithmetic);
  constexpr auto exists = [](int size) {
    return size < kLargest && cluster_tile(arithmetic, cell, size, kProjected).hidden == size;
  };
  const int padded = cluster_tile(arithmetic, cell, hidden, kProjected).hidden;
  if constexpr (exists(128))
    if (padded == 128) return use.template operator()<cell, 128, kProjected>();
  if constexpr (exists(192))
    if (padded == 192) return use.template operator()<cell, 192, kProjected>();
  if constexpr (exists(256))
    if (padded == 256) return use.template operator()<cell, 256, kProjected>();
  if constexpr (exists(384))
    if (padded == 384) return use.template operator()<cell, 384, kProjected>();
  return use.template operator()<cell, kLargest, kProjected>();
}

template <Arithmetic arithmetic, class Use>
auto with_cluster_kernel(const Shape& shape, Use use) {
  const int H = shape.hidden_size;
  if (shape.cell == Cell::kRnn) return with_cluster_size<arithmetic, Cell::kRnn, false>(H, use);
  if (shape.cell == Cell::kGru) return with_cluster_size<arithmetic, Cell::kGru, false>(H, use);
  return is_projected(shape) ? with_cluster_size<arithmetic, Cell::kLstm, true>(H, use)
                             : with_cluster_size<arithmetic, Cell::kLstm, false>(H, use);
}

inline dim3 cluster_grid(const Shape& shape, int ctas) {
  return {unsigned((shape.batch + kColumns - 1) / kColumns * ctas), unsigned(shape.directions)};
}

template <class Traits, class Layer>
cudaError_t cluster_fits(void (*kernel)(Layer), bool* fits) {
  unsigned blocks = 0;
  const cudaError_t error =
      resident_blocks(kernel, dim3(Traits::kThreads), Traits::kCtas, Traits::kSharedBytes, &blocks);
  *fits = blocks >= unsigned(Traits::kCtas);
  return error;
}

// Launches kernel(layer), unless no kernel serves the layer or there is nothing to do.
template <Arithmetic arithmetic, class Traits, class Layer>
cudaError_t launch_cluster(void (*kernel)(Layer), const Layer& layer, cudaStream_t stream) {
  if (cluster_refuses(arithmetic, layer)) return cudaErrorInvalidConfiguration;
  if (layer.batch == 0) return cudaSuccess;
  return launch(kernel, cluster_grid(layer, Traits::kCtas), dim3(Traits::kThreads), Traits::kCtas, false,
                Traits::kSharedBytes, stream, layer);
}

template <Arithmetic arithmetic>
ClusterResources cluster_forward_resources(const Shape& shape) {
  return with_cluster_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    using Traits = ClusterForward<arithmetic, cell, kHidden, kProjected>;
    return ClusterResources{Traits::kThreads, Traits::kSharedBytes, Traits::kCtas};
  });
}

template <Arithmetic arithmetic>
ClusterResources cluster_backward_resources(const Shape& shape) {
  return with_cluster_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    using Traits = ClusterBackward<arithmetic, cell, kHidden, kProjected>;
    return ClusterResources{Traits::kThreads, Traits::kSharedBytes, Traits::kCtas};
  });
}

template <Arithmetic arithmetic>
cudaError_t cluster_forward_fits(const Shape& shape, bool* fits) {
  return with_cluster_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    return cluster_fits<ClusterForward<arithmetic, cell, kHidden, kProjected>>(
        cluster_forward<arithmetic, cell, kHidden, kProjected>, fits);
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_cluster_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream) {
  return with_cluster_kernel<arithmetic>(layer, [&]<Cell cell, int kHidden, bool kProjected>() {
    return launch_cluster<arithmetic, ClusterForward<arithmetic, cell, kHidden, kProjected>>(
        cluster_forward<arithmetic, cell, kHidden, kProjected>, layer, stream);
  });
}

template <Arithmetic arithmetic>
cudaError_t cluster_backward_fits(const Shape& shape, bool* fits) {
  return with_cluster_kernel<arithmetic>(shape, [&]<Cell cell, int kHidden, bool kProjected>() {
    return cluster_fits<ClusterBackward<arithmetic, cell, kHidden, kProjected>>(
        cluster_backward<arithmetic, cell, kHidden, kProjected>, fits);
  });
}

template <Arithmetic arithmetic>
cudaError_t launch_cluster_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream) {
  return with_cluster_kernel<arithmetic>(layer, [&]<Cell cell, int kHidden, bool kProjected>() {
    return launch_cluster<arithmetic, ClusterBackward<arithmetic, cell, kHidden, kProjected>>(
        cluster_backward<arithmetic, cell, kHidden, kProjected>, layer, stream);
  });
}

}  // namespace rnnfast::cuda
