// Tier cluster: one cluster of CTAs runs the whole recurrence of a batch tile (8 sequences) in one direction. Each CTA
// has a slice of the units. Host side, without torch.
#pragma once

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

// The kernel that serves a shape.
struct ClusterTile {
  int hidden;          // the padded H
  int units;           // of a warp, in forward: 16, 8 or 4, with all their gates
  int ctas;            // of a cluster; over 8 do not fit every device that has clusters, see cluster_*_fits
  int backward_warps;  // of a CTA
};

constexpr int cluster_largest_hidden(Arithmetic arithmetic) { return is_16_bit(arithmetic) ? 512 : 256; }

// H is at most cluster_largest_hidden. A lane holds up to 128 words of weights in both passes; the number of CTAs is
// the least that allows this. (Exception: 144 words in backward of LSTM with H 384, 16 of them in shared memory,
// because 12 warps have too few registers.) Projected: W_hr lies in shared memory beside the low parts of W_hh, so
// exact float takes twice the CTAs for H 256. Projected slices are whole tiles of 16. 192 in float has none; 192 in 16
// bits is left out to compile less.
constexpr ClusterTile cluster_tile(Arithmetic arithmetic, Cell cell, int hidden, bool projected = false) {
  const bool rnn = cell == Cell::kRnn;
  if (is_16_bit(arithmetic)) {
    if (rnn) return hidden <= 384 ? ClusterTile{384, 16, 4, 8} : ClusterTile{512, 16, 4, 8};
    if (hidden <= 192 && !projected) return {192, 8, 4, 6};
    if (hidden <= 256) return {256, 8, 4, 8};
    return hidden <= 384 ? ClusterTile{384, 4, 8, 8} : ClusterTile{512, 4, 16, 8};
  }
  if (rnn) return hidden <= 192 ? ClusterTile{192, 16, 2, 6} : ClusterTile{256, 16, 2, 8};
  if (hidden <= 128) return arithmetic == Arithmetic::kTf32 ? ClusterTile{128, 8, 2, 8} : ClusterTile{128, 4, 4, 8};
  if (hidden <= 192 && !projected) return {192, 4, 8, 6};
  return projected && arithmetic == Arithmetic::kExact ? ClusterTile{256, 4, 16, 8} : ClusterTile{256, 4, 8, 8};
}

// Why no kernel serves a shape. Null: one does.
inline const char* cluster_refuses(Arithmetic arithmetic, const Shape& shape) {
  if (is_projected(shape) && (shape.cell != Cell::kLstm || shape.output_size <= 0))
    return "only an LSTM has a projection, of at least one output";
  return shape.hidden_size > cluster_largest_hidden(arithmetic) ? "weight_hh exceeds the registers of a cluster"
                                                                : nullptr;
}

// What a launch of a shape takes.
struct ClusterResources {
  int threads;       // of a CTA
  int shared_bytes;  // of a CTA
  int ctas;          // of a cluster
};

// For shapes that are not refused. Grid: ceil(B / 8) * ctas x D.
template <Arithmetic arithmetic>
ClusterResources cluster_forward_resources(const Shape& shape);
template <Arithmetic arithmetic>
ClusterResources cluster_backward_resources(const Shape& shape);
// Whether the current device can run a cluster of this shape's kernel. Its CTAs wait for each other, so all of them
// must run at once.
template <Arithmetic arithmetic>
cudaError_t cluster_forward_fits(const Shape& shape, bool* fits);
template <Arithmetic arithmetic>
cudaError_t cluster_backward_fits(const Shape& shape, bool* fits);
template <Arithmetic arithmetic>
cudaError_t launch_cluster_forward(const ForwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream);
template <Arithmetic arithmetic>
cudaError_t launch_cluster_backward(const BackwardLayer<ElementOf<arithmetic>>& layer, cudaStream_t stream);

}  // namespace rnnfast::cuda
