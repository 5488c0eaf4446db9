// Tier step, backward: one launch per time step, dh = dgates W_hh and the cell fused. Any size, any device from 7.5 on.
//
// Shapes      See layer.h. Steps run from the last to the first. Launch and tiles are as in forward.cuh, with one plane
//             and K = G*H. Rows of padded input beyond a sequence's length get zero gradients.
// Ownership   A CTA computes dh of kUnits units from the gate gradients of the step that follows in time.
// One step    dh gets grad_output added, and grad_h_n at a sequence's last step. The CTA writes the gate gradients of
//             its own step. From step to step, dc and GRU's dh z go through float32 scratch [D, B, H], all else through
//             grad_gates.
// Projection  A step is two launches. `step_grad_state` forms grad_projected from the gate gradients of the following
//             step. `step_backward` multiplies it by weight_hr. With or without a projection, `step_grad_state` ends
//             the walk with grad_hx.
// Sync        Between launches, the stream's order. Within a launch, see product.cuh.
// Limits      Weights are transposed, K contiguous, rows 16-byte aligned. The host makes the copies once per call.
#pragma once

#include "cuda/tiers/step/forward.cuh"

namespace rnnfast::cuda {

// The gate gradients that multiply W_hh at a row: all planes but GRU's n_x.
template <class Element>
RNNFAST_DEVICE const Element* recurrent_grads(const StepBackward<Element>& call, int d, int64_t row) {
  const int64_t H = call.hidden_size;
  return call.grad_gates + (d * call.rows + row) * grad_planes(call.cell) * H + (call.cell == Cell::kGru ? H : 0);
}

// The following step's gate gradients of sequence b, or null where there is none.
template <class Element>
RNNFAST_DEVICE const Element* following_grads(const StepBackward<Element>& call, int d, int t, int b) {
  if (b >= call.batch) return nullptr;
  const Position at = position(call, d, t, b);
  if (!at.active || at.last) return nullptr;
  return recurrent_grads(call, d, first_row(call, d ? t - 1 : t + 1) + b);
}

template <Arithmetic kArithmetic, Cell kCell, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_backward(const __grid_constant__ StepBackward<ElementOf<kArithmetic>> call, int step) {
  using Tile = StepTile<kArithmetic, 1, kLarge>;
  using Element = typename Tile::Element;
  using Maths = CellMath<ExactMath>;
  constexpr int kPlanes = grad_planes(kCell);
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  if (nothing_to_do(call, t, b0)) return;
  const int64_t H = call.hidden_size, P = call.output_size, B = call.batch;
  const bool projected = kCell == Cell::kLstm && call.grad_projected;

  const auto row_of = [&](int b) -> const Element* {
    b += b0;
    if (!projected) return following_grads(call, d, t, b);
    if (b >= B || t >= length_of(call, b)) return nullptr;
    return call.grad_projected + (d * call.rows + first_row(call, t) + b) * P;
  };
  const AlignedWeight<Element>& own = projected ? call.projection[d] : call.recurrent[d];
  const WeightRows<Element> weight{own.data + u0 * own.stride, own.stride, 0, H - u0};
  step_product<Tile>(shared, weight, row_of, projected ? P : gate_count(kCell) * H,
                     projected ? call.aligned_projected : call.aligned);

#pragma unroll 2
  for (int i = 0; i < Tile::kCells; ++i) {
    const int cell = i * kStepThreads + int(threadIdx.x), tile_u = cell % Tile::kUnits, tile_b = cell / Tile::kUnits;
    const int u = u0 + tile_u, b = b0 + tile_b;
    if (u >= H || b >= B) continue;
    const Position at = position(call, d, t, b);
    const int64_t state = (d * B + b) * H + u, saved = d * call.rows + at.row;
    const auto incoming = [&](const Element* grad, int64_t index) { return grad ? to_float(grad[index]) : 0.0f; };
    Element* const grads = call.grad_gates + saved * kPlanes * H + u;
    if (!at.active) {
      if (kCell == Cell::kLstm && call.grad_cx && length_of(call, b) == 0 && step == call.steps - 1)
        call.grad_cx[state] = from_float<Element>(incoming(call.grad_c_n, state));
      for (int plane = 0; !call.offsets && plane < kPlanes; ++plane) grads[plane * H] = from_float<Element>(0.0f);
      continue;
    }

    float dh = sum_at<Tile>(shared, 0, tile_u, tile_b);
    if (!projected) {
      dh += incoming(call.grad_output, at.row * call.directions * H + d * H + u);
      if (at.last) dh += incoming(call.grad_h_n, state);
    }
    const Element* const gates = call.gates + saved * 4 * H + u;
    if constexpr (kCell == Cell::kRnn) {
      const float h = to_float(call.output[at.row * call.directions * H + d * H + u]);
      grads[0] = from_float<Element>(Maths::rnn_backward(dh, h, call.relu));
    } else if constexpr (kCell == Cell::kGru) {
      if (!at.last) dh += call.carry[state];
      const float h =
          at.first ? incoming(call.hx, state) : to_float(call.output[at.previous * call.directions * H + d * H + u]);
      const auto grad = Maths::gru_backward(dh, to_float(gates[0]), to_float(gates[H]), to_float(gates[2 * H]),
                                            to_float(gates[3 * H]), h);
      grads[0] = from_float<Element>(grad.n_x);
      grads[H] = from_float<Element>(grad.r);
      grads[2 * H] = from_float<Element>(grad.z);
      grads[3 * H] = from_float<Element>(grad.n_h);
      call.carry[state] = grad.carry;
    } else {
      const float dc = at.last ? incoming(call.grad_c_n, state) : call.carry[state];
      const float c_prev = at.first ? incoming(call.cx, state) : call.c[(d * call.rows + at.previous) * H + u];
      const auto grad = Maths::lstm_backward(dh, dc, to_float(gates[0]), to_float(gates[H]), to_float(gates[2 * H]),
                                             to_float(gates[3 * H]), call.c[saved * H + u], c_prev);
      grads[0] = from_float<Element>(grad.i);
      grads[H] = from_float<Element>(grad.f);
      grads[2 * H] = from_float<Element>(grad.g);
      grads[3 * H] = from_float<Element>(grad.o);
      call.carry[state] = grad.dc;
      if (at.first && call.grad_cx) call.grad_cx[state] = from_float<Element>(grad.dc);
    }
  }
}

// step >= 0: grad_projected of that step. step = -1: grad_hx. Tiles cut P instead of H.
template <Arithmetic kArithmetic, bool kLarge>
__global__ void __launch_bounds__(kStepThreads)
    step_grad_state(const __grid_constant__ StepBackward<ElementOf<kArithmetic>> call, int step) {
  using Tile = StepTile<kArithmetic, 1, kLarge>;
  using Element = typename Tile::Element;
  unsigned char* const shared = shared_memory();
  const int d = int(blockIdx.z), t = d ? call.steps - 1 - step : step;
  const int b0 = int(blockIdx.x) * Tile::kBatch, u0 = int(blockIdx.y) * Tile::kUnits;
  const bool to_hx = step < 0;
  if (!to_hx && nothing_to_do(call, t, b0)) return;
  const int64_t P = call.output_size, B = call.batch;

  const auto row_of = [&](int b) -> const Element* {
    b += b0;
    if (!to_hx) return following_grads(call, d, t, b);
    const int length = b < B ? length_of(call, b) : 0;
    return length ? recurrent_grads(call, d, first_row(call, d ? length - 1 : 0) + b) : nullptr;
  };
  const AlignedWeight<Element>& own = call.recurrent[d];
  const WeightRows<Element> weight{own.data + u0 * own.stride, own.stride, 0, P - u0};
  step_product<Tile>(shared, weight, row_of, int64_t(gate_count(call.cell)) * call.hidden_size, call.aligned);

#pragma unroll 2
  for (int i = 0; i < Tile::kCells; ++i) {
    const int cell = i * kStepThreads + int(threadIdx.x), tile_u = cell % Tile::kUnits, tile_b = cell / Tile::kUnits;
    const int u = u0 + tile_u, b = b0 + tile_b;
    if (u >= P || b >= B) continue;
    const int64_t state = (d * B + b) * P + u;
    float dh = sum_at<Tile>(shared, 0, tile_u, tile_b);
    if (to_hx) {
      if (length_of(call, b) == 0)
        dh = call.grad_h_n ? to_float(call.grad_h_n[state]) : 0.0f;  // no step: the gradient passes through
      else if (call.cell == Cell::kGru)
        dh += call.carry[state];
      call.grad_hx[state] = from_float<Element>(dh);
      continue;
    }
    const Position at = position(call, d, t, b);
    if (!at.active && call.offsets) continue;
    if (at.active && call.grad_output) dh += to_float(call.grad_output[at.row * call.directions * P + d * P + u]);
    if (at.active && at.last && call.grad_h_n) dh += to_float(call.grad_h_n[state]);
    call.grad_projected[(d * call.rows + at.row) * P + u] = from_float<Element>(at.active ? dh : 0.0f);
  }
}

// All steps of a layer on `stream`. The first error ends the walk.
template <Arithmetic kArithmetic, Cell kCell, bool kLarge>
cudaError_t launch_step_backward_tile(const StepBackward<ElementOf<kArithmetic>>& call, cudaStream_t stream) {
  using Tile = StepTile<kArithmetic, 1, kLarge>;
  const auto grad_state = [&](int step) {
    return launch_tiles<Tile>(step_grad_state<kArithmetic, kLarge>, call.output_size, call, step, stream);
  };
  for (int step = call.steps - 1; step >= 0; --step) {
    cudaError_t error = call.grad_projected ? grad_state(step) : cudaSuccess;
    if (error != cudaSuccess) return error;
    error = launch_tiles<Tile>(step_backward<kArithmetic, kCell, kLarge>, call.hidden_size, call, step, stream);
    if (error != cudaSuccess) return error;
  }
  return call.grad_hx ? grad_state(-1) : cudaSuccess;
}

template <Arithmetic kArithmetic>
cudaError_t run_step_backward(const StepBackward<void>& layer, bool large, cudaStream_t stream) {
  const auto call = std::bit_cast<StepBackward<ElementOf<kArithmetic>>>(layer);
  switch (call.cell) {
    case Cell::kRnn:
      return large ? launch_step_backward_tile<kArithmetic, Cell::kRnn, true>(call, stream)
                   : launch_step_backward_tile<kArithmetic, Cell::kRnn, false>(call, stream);
    case Cell::kGru:
      return large ? launch_step_backward_tile<kArithmetic, Cell::kGru, true>(call, stream)
                   : launch_step_backward_tile<kArithmetic, Cell::kGru, false>(call, stream);
    case Cell::kLstm:
      return large ? launch_step_backward_tile<kArithmetic, Cell::kLstm, true>(call, stream)
                   : launch_step_backward_tile<kArithmetic, Cell::kLstm, false>(call, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace rnnfast::cuda
