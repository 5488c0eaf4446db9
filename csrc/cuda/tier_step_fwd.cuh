// Tier step, forward: one launch per time step, W_hh h' and the cell fused. Any size, any device from 7.5 on.
//
// Shapes: csrc/cuda/layer.h. Launch (batch tiles, unit tiles, directions); direction d handles its own time.
// A CTA forms gates W_hh h' of kUnits units and kBatch rows of the batch (tier_step_product.cuh) and applies the cell.
// Nothing stays on chip from step to step: h' is the previous step's rows of `output` itself (hx at a sequence's first
// step), c' is read from the saved c, or from `carry` where nothing is saved. W_hh comes from L2 at every step.
// With a projection `step_forward` leaves o tanh(c) in `cells`, and a second launch, `step_project`, multiplies it by
// weight_hr into `output`.
// Synchronisation: the stream's order between launches; within one see tier_step_product.cuh.
// Saved for backward: gates and c, in the shapes of layer.h. gates may be gates_x: a thread writes what it alone read.
// Limits: B below 2^31, H below 16 * 65535 (the grid); weight rows 16-byte aligned (host).
#pragma once

#include "math.cuh"
#include "plan.h"
#include "tier_step_product.cuh"

namespace rnnfast::cuda {

// A weight as the product reads it: rows 16-byte aligned, K padded by zeros.
template <class Element>
struct AlignedWeight {
  const Element* data;
  int64_t stride;
};

template <class Element>
struct StepForward : ForwardLayer<Element> {
  AlignedWeight<Element> recurrent[kMaxDirections];   // weight_hh [G*H, P]
  AlignedWeight<Element> projection[kMaxDirections];  // weight_hr [P, H]
  float* carry;     // [D, B, H]: c between steps, LSTM's inference only
  Element* cells;   // [D, B, H]: o tanh(c), projected only
  bool aligned;     // rows of hx and output are 16-byte aligned, P a multiple of 16 bytes
  bool aligned_cells;
};

// Where sequence b stands at time t of direction d. t is the same for a whole launch, so tests on it do not diverge.
struct Position {
  bool active, first, last;  // first, last: in the order in which the direction runs
  int64_t row, previous;     // previous: undefined where `first`
};

__device__ __forceinline__ int64_t first_row(const Shape& shape, int64_t t) {
  return shape.offsets ? shape.offsets[t] : t * shape.batch;
}

__device__ __forceinline__ int length_of(const Shape& shape, int b) {
  return shape.lengths ? shape.lengths[b] : shape.steps;
}

__device__ __forceinline__ Position position(const Shape& shape, int direction, int t, int b) {
  const int length = length_of(shape, b);
  Position at;
  at.active = t < length;
  at.first = direction ? t == length - 1 : t == 0;
  at.last = direction ? t == 0 : t == length - 1;
  at.row = first_row(shape, t) + b;
  at.previous = at.first || !at.active ? 0 : first_row(shape, direction ? t + 1 : t - 1) + b;
  return at;
}

// No sequence of the tile takes part at time t, and no row of it exists in memory.
__device__ __forceinline__ bool nothing_to_do(const Shape& shape, int t, int first_b) {
  return shape.offsets && t >= shape.lengths[first_b];  // packed: lengths fall
}

template <Product kProduct, Cell kCell, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_forward(const __grid_constant__ StepForward<ElementOf<kProduct>> call, int step) {
  using Tile = StepTile<kProduct, gate_count(kCell), kLarge>;
  using Element = typename Tile::Element;
  using Maths = CellMath<Math<kProduct>>;
  constexpr int kGates = gate_count(kCell);
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  if (nothing_to_do(call, t, b0)) return;
  const int64_t H = call.hidden_size, P = call.output_size, B = call.batch, width = call.directions * P;
  const Element* const outputs = call.output + d * P;
  const Element* const hx = call.hx ? call.hx + d * B * P : nullptr;

  // h' of sequence b, null for zeros
  const auto state_row = [&](int b) -> const Element* {
    if (b >= B) return nullptr;
    const Position at = position(call, d, t, b);
    if (!at.active) return nullptr;
    return !at.first ? outputs + at.previous * width : hx ? hx + b * P : nullptr;
  };
  const WeightRows<Element> weight{call.recurrent[d].data + u0 * call.recurrent[d].stride, call.recurrent[d].stride, H,
                                   H - u0};
  step_product<Tile>(shared, weight, [&](int b) { return state_row(b0 + b); }, P, call.aligned);

#pragma unroll 2
  for (int i = 0; i < Tile::kCells; ++i) {
    const int cell = i * kStepThreads + int(threadIdx.x), tile_u = cell % Tile::kUnits, tile_b = cell / Tile::kUnits;
    const int u = u0 + tile_u, b = b0 + tile_b;
    if (u >= H || b >= B) continue;
    const Position at = position(call, d, t, b);
    const int64_t state = (d * B + b) * H + u, saved = d * call.rows + at.row;
    Element* const output = call.output + at.row * width + d * P + u;  // of a layer without a projection
    if (!at.active) {
      if (length_of(call, b) == 0 && step == 0) {  // no step: the states pass through
        if (!call.cells) call.h_n[state] = hx ? hx[b * P + u] : from_float<Element>(0.0f);
        if (kCell == Cell::kLstm) call.c_n[state] = call.cx ? call.cx[state] : from_float<Element>(0.0f);
      }
      if (call.offsets) continue;
      if (!call.cells) *output = from_float<Element>(0.0f);
      for (int plane = 0; call.gates && plane < saved_planes(kCell); ++plane)
        call.gates[saved * 4 * H + plane * H + u] = from_float<Element>(0.0f);
      if (call.c) call.c[saved * H + u] = 0.0f;
      continue;
    }

    const Element* const x = call.gates_x + saved * kGates * H + u;
    float gate[kGates];
#pragma unroll
    for (int plane = 0; plane < kGates; ++plane)
      gate[plane] = to_float(x[plane * H]) + (kCell == Cell::kGru && plane == 2 ? 0.0f : sum_at<Tile>(shared, plane, tile_u, tile_b));
    float h;
    if constexpr (kCell == Cell::kRnn) {
      h = Maths::rnn_forward(gate[0], call.relu);
    } else if constexpr (kCell == Cell::kGru) {
      const Element* const before = state_row(b);
      float hn = sum_at<Tile>(shared, 2, tile_u, tile_b);
      if (call.weights[d].bias_hn) hn += to_float(call.weights[d].bias_hn[u]);
      h = Maths::gru_forward(gate[0], gate[1], gate[2], hn, before ? to_float(before[u]) : 0.0f);
      if (call.gates) call.gates[saved * 4 * H + 3 * H + u] = from_float<Element>(hn);
    } else {
      float c = !at.first ? (call.c ? call.c[(d * call.rows + at.previous) * H + u] : call.carry[state])
                : call.cx ? to_float(call.cx[state])
                          : 0.0f;
      h = Maths::lstm_forward(gate[0], gate[1], gate[2], gate[3], c);
      (call.c ? call.c[saved * H + u] : call.carry[state]) = c;
      if (at.last) call.c_n[state] = from_float<Element>(c);
    }
    if constexpr (kCell != Cell::kRnn) {
#pragma unroll
      for (int plane = 0; plane < kGates; ++plane)
        if (call.gates) call.gates[saved * 4 * H + plane * H + u] = from_float<Element>(gate[plane]);
    }
    if (call.cells) {
      call.cells[state] = from_float<Element>(h);
    } else {
      *output = from_float<Element>(h);
      if (at.last) call.h_n[state] = from_float<Element>(h);
    }
  }
}

// h = W_hr (o tanh(c)); tiles are of P in place of H.
template <Product kProduct, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_project(const __grid_constant__ StepForward<ElementOf<kProduct>> call, int step) {
  using Tile = StepTile<kProduct, 1, kLarge>;
  using Element = typename Tile::Element;
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  if (nothing_to_do(call, t, b0)) return;
  const int64_t H = call.hidden_size, P = call.output_size, B = call.batch;

  const auto row_of = [&](int b) -> const Element* {
    b += b0;
    return b < B && t < length_of(call, b) ? call.cells + (d * B + b) * H : nullptr;
  };
  const AlignedWeight<Element>& own = call.projection[d];
  const WeightRows<Element> weight{own.data + u0 * own.stride, own.stride, 0, P - u0};
  step_product<Tile>(shared, weight, row_of, H, call.aligned_cells);

#pragma unroll 2
  for (int i = 0; i < Tile::kCells; ++i) {
    const int cell = i * kStepThreads + int(threadIdx.x), tile_u = cell % Tile::kUnits, tile_b = cell / Tile::kUnits;
    const int u = u0 + tile_u, b = b0 + tile_b;
    if (u >= P || b >= B) continue;
    const Position at = position(call, d, t, b);
    const int64_t state = (d * B + b) * P + u;
    if (!at.active) {
      if (length_of(call, b) == 0 && step == 0) call.h_n[state] = call.hx ? call.hx[state] : from_float<Element>(0.0f);
      if (call.offsets) continue;
    }
    const Element h = from_float<Element>(at.active ? sum_at<Tile>(shared, 0, tile_u, tile_b) : 0.0f);
    call.output[at.row * call.directions * P + d * P + u] = h;
    if (at.active && at.last) call.h_n[state] = h;
  }
}

// All steps of a layer on `stream`. The first error ends it.
template <Product kProduct, Cell kCell, bool kLarge>
cudaError_t launch_step_forward_tile(const StepForward<ElementOf<kProduct>>& call, cudaStream_t stream) {
  using Tile = StepTile<kProduct, gate_count(kCell), kLarge>;
  using ProjectTile = StepTile<kProduct, 1, kLarge>;
  const auto grid = [&](int64_t units, int tile_units, int tile_batch) {
    return dim3(unsigned(divide_up(call.batch, tile_batch)), unsigned(divide_up(units, tile_units)),
                unsigned(call.directions));
  };
  for (int step = 0; step < call.steps; ++step) {
    cudaError_t error = launch(step_forward<kProduct, kCell, kLarge>,
                               {grid(call.hidden_size, Tile::kUnits, Tile::kBatch), kStepThreads, Tile::kSharedBytes, stream}, call, step);
    if (error != cudaSuccess) return error;
    if constexpr (kCell == Cell::kLstm) {
      if (!call.cells) continue;
      error = launch(step_project<kProduct, kLarge>,
                     {grid(call.output_size, ProjectTile::kUnits, ProjectTile::kBatch), kStepThreads, ProjectTile::kSharedBytes, stream}, call, step);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <Product kProduct>
cudaError_t launch_step_forward(const StepForward<ElementOf<kProduct>>& call, bool large, cudaStream_t stream) {
  switch (call.cell) {
    case Cell::kRnn:
      return large ? launch_step_forward_tile<kProduct, Cell::kRnn, true>(call, stream)
                   : launch_step_forward_tile<kProduct, Cell::kRnn, false>(call, stream);
    case Cell::kGru:
      return large ? launch_step_forward_tile<kProduct, Cell::kGru, true>(call, stream)
                   : launch_step_forward_tile<kProduct, Cell::kGru, false>(call, stream);
    case Cell::kLstm:
      return large ? launch_step_forward_tile<kProduct, Cell::kLstm, true>(call, stream)
                   : launch_step_forward_tile<kProduct, Cell::kLstm, false>(call, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace rnnfast::cuda
