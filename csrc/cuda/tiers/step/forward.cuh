// Tier step, forward: one launch per time step, W_hh h' and the cell fused. Any size, any device from 7.5 on.
//
// Shapes      See layer.h. Grid: batch tiles, unit tiles, directions. Direction d handles its own time.
// Ownership   A CTA computes the gates of kUnits units and kBatch rows of the batch (product.cuh) and applies the cell.
//             Nothing stays on the chip from step to step, and W_hh comes from L2 at every step.
// One step    h' is the previous step's rows of `output`, or hx at a sequence's first step. c' is the saved c; where
//             nothing is saved, `carry`.
// Projection  A step is two launches. `step_forward` leaves o tanh(c) in `unprojected`. `step_project` multiplies it by
//             weight_hr into `output`.
// Sync        Between launches, the stream's order. Within a launch, see product.cuh.
// Saved       gates and c, in the shapes of layer.h. gates may be gates_x: a thread writes only what it alone has read.
// Limits      B below 2^31, H below 16 * 65535 (the grid). Weight rows are 16-byte aligned (by the host).
#pragma once

#include <bit>

#include "cuda/device/position.cuh"
#include "cuda/plan/plan.h"
#include "cuda/plan/tiers.h"
#include "cuda/tiers/step/product.cuh"

namespace rnnfast::cuda {

// Whether no sequence of the tile takes part at time t and none of its rows exists in memory.
RNNFAST_DEVICE bool nothing_to_do(const Shape& shape, int t, int first_b) {
  return shape.offsets && t >= shape.lengths[first_b];  // packed: lengths fall
}

template <Arithmetic kArithmetic, Cell kCell, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_forward(const __grid_constant__ StepForward<ElementOf<kArithmetic>> call, int step) {
  using Tile = StepTile<kArithmetic, gate_count(kCell), kLarge>;
  using Element = typename Tile::Element;
  using Maths = CellMath<ForwardMath<Element>>;
  constexpr int kGates = gate_count(kCell);
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  if (nothing_to_do(call, t, b0)) return;
  const int64_t H = call.hidden_size, P = call.output_size, B = call.batch, width = call.directions * P;
  const Element* const outputs = call.output + d * P;
  const Element* const hx = call.hx ? call.hx + d * B * P : nullptr;

  // h' of sequence b; null: zeros.
  const auto state_row = [&](int b) -> const Element* {
    if (b >= B) return nullptr;
    const Position at = position(call, d, t, b);
    if (!at.active) return nullptr;
    return !at.first ? outputs + at.previous * width : hx ? hx + b * P : nullptr;
  };
  // What a cell needs beside W_hh h'. i counts the thread's cells.
  struct Inputs {
    Position at;
    float x[kGates];
    float before;  // c' of an LSTM, h' of a GRU
  };
  const auto tile_unit = [](int i) { return (i * kStepThreads + int(threadIdx.x)) % Tile::kUnits; };
  const auto tile_row = [](int i) { return (i * kStepThreads + int(threadIdx.x)) / Tile::kUnits; };
  const auto load = [&](int i) {
    Inputs in{};
    const int u = u0 + tile_unit(i), b = b0 + tile_row(i);
    if (u >= H || b >= B) return in;
    in.at = position(call, d, t, b);
    if (!in.at.active) return in;
    const Element* const x = call.gates_x + (d * call.rows + in.at.row) * kGates * H + u;
#pragma unroll
    for (int plane = 0; plane < kGates; ++plane) in.x[plane] = to_float(x[plane * H]);
    if constexpr (kCell == Cell::kGru) {
      const Element* const row = state_row(b);
      in.before = row ? to_float(row[u]) : 0.0f;
    } else if constexpr (kCell == Cell::kLstm) {
      const int64_t state = (d * B + b) * H + u;
      in.before = !in.at.first ? (call.c ? call.c[(d * call.rows + in.at.previous) * H + u] : call.carry[state])
                  : call.cx    ? to_float(call.cx[state])
                               : 0.0f;
    }
    return in;
  };
  // The small tile has few cells. They are loaded while the product runs.
  constexpr bool kEarly = Tile::kCells <= 2;
  Inputs early[kEarly ? Tile::kCells : 1];
  if constexpr (kEarly) {
#pragma unroll
    for (int i = 0; i < Tile::kCells; ++i) early[i] = load(i);
  }

  const WeightRows<Element> weight{call.recurrent[d].data + u0 * call.recurrent[d].stride, call.recurrent[d].stride, H,
                                   H - u0};
  step_product<Tile>(shared, weight, [&](int b) { return state_row(b0 + b); }, P, call.aligned);

#pragma unroll 2
  for (int i = 0; i < Tile::kCells; ++i) {
    const int tile_u = tile_unit(i), tile_b = tile_row(i), u = u0 + tile_u, b = b0 + tile_b;
    if (u >= H || b >= B) continue;
    const Inputs in = kEarly ? early[kEarly ? i : 0] : load(i);
    const Position& at = in.at;
    const int64_t state = (d * B + b) * H + u, saved = d * call.rows + at.row;
    Element* const output = call.output + at.row * width + d * P + u;  // of a layer without a projection
    if (!at.active) {
      if (length_of(call, b) == 0 && step == 0) {  // no step: the states pass through
        if (!call.unprojected) call.h_n[state] = hx ? hx[b * P + u] : from_float<Element>(0.0f);
        if (kCell == Cell::kLstm) call.c_n[state] = call.cx ? call.cx[state] : from_float<Element>(0.0f);
      }
      if (call.offsets) continue;
      if (!call.unprojected) *output = from_float<Element>(0.0f);
      for (int plane = 0; call.gates && plane < saved_planes(kCell); ++plane)
        call.gates[saved * 4 * H + plane * H + u] = from_float<Element>(0.0f);
      if (call.c) call.c[saved * H + u] = 0.0f;
      continue;
    }

    float gate[kGates];
#pragma unroll
    for (int plane = 0; plane < kGates; ++plane)
      gate[plane] =
          in.x[plane] + (kCell == Cell::kGru && plane == 2 ? 0.0f : sum_at<Tile>(shared, plane, tile_u, tile_b));
    float h;
    if constexpr (kCell == Cell::kRnn) {
      h = Maths::rnn_forward(gate[0], call.relu);
    } else if constexpr (kCell == Cell::kGru) {
      float hn = sum_at<Tile>(shared, 2, tile_u, tile_b);
      if (call.weights[d].bias_hn) hn += to_float(call.weights[d].bias_hn[u]);
      h = Maths::gru_forward(gate[0], gate[1], gate[2], hn, in.before);
      if (call.gates) call.gates[saved * 4 * H + 3 * H + u] = from_float<Element>(hn);
    } else {
      float c = in.before;
      h = Maths::lstm_forward(gate[0], gate[1], gate[2], gate[3], c);
      (call.c ? call.c[saved * H + u] : call.carry[state]) = c;
      if (at.last) call.c_n[state] = from_float<Element>(c);
    }
    if constexpr (kCell != Cell::kRnn) {
#pragma unroll
      for (int plane = 0; plane < kGates; ++plane)
        if (call.gates) call.gates[saved * 4 * H + plane * H + u] = from_float<Element>(gate[plane]);
    }
    if (call.unprojected) {
      call.unprojected[state] = from_float<Element>(h);
    } else {
      *output = from_float<Element>(h);
      if (at.last) call.h_n[state] = from_float<Element>(h);
    }
  }
}

// h = W_hr (o tanh(c)). Tiles cut P instead of H.
template <Arithmetic kArithmetic, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_project(const __grid_constant__ StepForward<ElementOf<kArithmetic>> call, int step) {
  using Tile = StepTile<kArithmetic, 1, kLarge>;
  using Element = typename Tile::Element;
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  if (nothing_to_do(call, t, b0)) return;
  const int64_t H = call.hidden_size, P = call.output_size, B = call.batch;

  const auto row_of = [&](int b) -> const Element* {
    b += b0;
    return b < B && t < length_of(call, b) ? call.unprojected + (d * B + b) * H : nullptr;
  };
  const AlignedWeight<Element>& own = call.projection[d];
  const WeightRows<Element> weight{own.data + u0 * own.stride, own.stride, 0, P - u0};
  step_product<Tile>(shared, weight, row_of, H, call.aligned_unprojected);

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

// One launch over all tiles: `units` units, the whole batch, all directions.
template <class Tile, class Call>
cudaError_t launch_tiles(void (*kernel)(Call, int), int64_t units, const Call& call, int step, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(call.batch, Tile::kBatch)), unsigned(divide_up(units, Tile::kUnits)),
                  unsigned(call.directions));
  return launch(kernel, grid, dim3(kStepThreads), 1, false, Tile::kSharedBytes, stream, call, step);
}

template <Arithmetic kArithmetic, Cell kCell, bool kLarge>
cudaError_t launch_step_forward_tile(const StepForward<ElementOf<kArithmetic>>& call, cudaStream_t stream) {
  using Tile = StepTile<kArithmetic, gate_count(kCell), kLarge>;
  using ProjectTile = StepTile<kArithmetic, 1, kLarge>;
  for (int step = 0; step < call.steps; ++step) {
    cudaError_t error =
        launch_tiles<Tile>(step_forward<kArithmetic, kCell, kLarge>, call.hidden_size, call, step, stream);
    if (error != cudaSuccess) return error;
    if constexpr (kCell == Cell::kLstm) {
      if (!call.unprojected) continue;
      error = launch_tiles<ProjectTile>(step_project<kArithmetic, kLarge>, call.output_size, call, step, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <Arithmetic kArithmetic>
cudaError_t run_step_forward(const StepForward<void>& layer, bool large, cudaStream_t stream) {
  const auto call = std::bit_cast<StepForward<ElementOf<kArithmetic>>>(layer);
  switch (call.cell) {
    case Cell::kRnn:
      return large ? launch_step_forward_tile<kArithmetic, Cell::kRnn, true>(call, stream)
                   : launch_step_forward_tile<kArithmetic, Cell::kRnn, false>(call, stream);
    case Cell::kGru:
      return large ? launch_step_forward_tile<kArithmetic, Cell::kGru, true>(call, stream)
                   : launch_step_forward_tile<kArithmetic, Cell::kGru, false>(call, stream);
    case Cell::kLstm:
      return large ? launch_step_forward_tile<kArithmetic, Cell::kLstm, true>(call, stream)
                   : launch_step_forward_tile<kArithmetic, Cell::kLstm, false>(call, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace rnnfast::cuda
