// Tier group, backward: the recurrence of 8 sequences and one direction, against its time, in a group of CTAs.
//
// Shapes      As in tier_group_fwd.cuh: grid x = members, 16 units (RNN 32) each; y = groups from first_group on.
// Ownership   A CTA computes dh of its units, hence has their columns of W_hh (all gates of all units are the depth) as
//             the a operand of mma in registers, what exceeds those in shared memory. Each warp has kHidden / kWarps
//             units of every gate as its slice of the depth. A thread owns a cell as in forward: dh, dc and c stay in
//             its registers (float).
// One step    cells: gate gradients | to the exchange and to memory | wait for this warp's slice of them | partial sums
//             = W_hh^T dgates (mma) | to shared memory | barrier | dh: sum over warps in their order.
//             The next step's saved values are loaded before the wait.
// Exchange    See exchange.cuh. Slot s holds the gate gradients of step s: those planes that W_hh multiplies.
// One barrier As in tier_group_fwd.cuh: two halves of partial sums.
// Stored      grad_gates (planes as in csrc/common/cell.h): the gradients of weights, biases and x are products over
//             all rows afterwards.
// c and h'    belong to the step before in the direction's order: cx and hx at a sequence's first step. LSTM keeps c
//             for one step.
// Limits      The exchange is G times forward's. Sending partial dh instead (float, all units from all members) would
//             be twice forward's, but adds up in memory: fixed order would cost another exchange.
#pragma once

#include "tier_group_fwd.cuh"

namespace rnnfast::cuda {

template <Product product, Cell cell, int kHidden, int kWarps>
struct GroupBackward {
  using Element = ElementOf<product>;
  using Maths = CellMath<ExactMath>;
  static constexpr int kGates = gate_count(cell);  // planes that multiply W_hh
  static constexpr int kSavedPlanes = saved_planes(cell);
  static constexpr int kGradPlanes = grad_planes(cell);  // planes in memory
  static constexpr int kLargestHidden = kHidden;
  static constexpr int kUnits = group_units(cell);
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kTiles = kUnits / kTileRows;
  static constexpr int kDepth = kHidden / kWarps;  // units of a warp's slice

  using Slots = Exchange<product, kGates, kHidden, kWarps>;
  // Exact products need more registers beside the weights, for more sums and the low parts of gate gradients. Weights
  // that exceed the budget anyway leave some for what they need on their way from shared memory.
  static constexpr int kWords = kTiles * kGates * kDepth * int(sizeof(Element)) / kChunkBytes * 8;  // of a lane
  static constexpr int kReserve = Arithmetic<product>::kParts == 2 ? 48 : kWords > kWeightBudget ? 16 : 0;
  using Recurrent = WeightTiles<product, kTiles, kGates * kDepth, kWarps, kWeightBudget - kReserve>;
  using Sums = PartialSums<kTiles, kWarps>;
  using Cells = CellPlaces<kUnits, kThreads>;
  using Stage = ColumnStage<product, kDepth>;
  // What the cell's derivative needs beside gates: LSTM c and GRU h of the step before, RNN h of the step itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;

  // Shared memory: weights that are kept there, then (in turn) the stages of weights, or partial sums.
  static constexpr int kSums = Recurrent::kSharedBytes;
  static constexpr int kStages = kWarps * Stage::kBytes;
  static constexpr int kSharedBytes = kSums + max_of(Sums::kBytes, kStages);
};

template <Product product, Cell cell, int kHidden, int kWarps>
__global__ void __launch_bounds__(GroupBackward<product, cell, kHidden, kWarps>::kThreads, 1)
    group_backward(const __grid_constant__ BackwardLayer<ElementOf<product>> layer, unsigned char* exchange,
                   int first_group) {
  using Plan = GroupBackward<product, cell, kHidden, kWarps>;
  using Element = typename Plan::Element;
  using Cells = typename Plan::Cells;
  using Slots = typename Plan::Slots;
  constexpr int kOwn = Cells::kOwn;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int group = first_group + int(blockIdx.y), direction = group % layer.directions, H = layer.hidden_size;
  const BatchTile tile(layer, group / layer.directions, direction);
  const int64_t first_row = int64_t(direction) * layer.rows;
  const int first_unit = int(blockIdx.x) * Plan::kUnits;
  const int covered = round_up(H, Plan::kUnits);  // units that some member sends
  unsigned char* const slots = exchange + int64_t(group) * layer.steps * Slots::kSlotBytes;

  typename Plan::Recurrent recurrent;
  recurrent.place(shared, lane);
#pragma unroll
  for (int i = 0; i < Plan::kTiles * Plan::kGates; ++i) {
    using Stage = typename Plan::Stage;
    unsigned char* const stage = shared + Plan::kSums + lane.warp * Stage::kBytes;
    const int block = i / Plan::kGates, plane = i % Plan::kGates;
    const int u = first_unit + block * kTileRows, k = lane.warp * Plan::kDepth;
    Stage::fill(stage, layer.weights[direction].weight_hh + (int64_t(plane) * H + k) * H + u, H,
                min(H - k, Plan::kDepth), H - u);
    recurrent.load(block, plane * Slots::kPlaneChunks, Slots::kPlaneChunks,
                   [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); });
  }
  block_sync();

  int unit[kOwn], column[kOwn], length[kOwn];
  // dh: gradient of the step's output that comes from the step after it, or from h_n. initial: cx or hx.
  float dh[kOwn], dc[kOwn], c[kOwn], initial[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i)) continue;
    unit[i] = first_unit + Cells::unit(i), column[i] = Cells::column(i);
    length[i] = unit[i] < H ? tile.length(column[i]) : 0;  // units of the padding send zeros
    const bool known = unit[i] < H && tile.first + column[i] < tile.batch;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + column[i]) * H + unit[i];
    dh[i] = known && layer.grad_h_n ? to_float(layer.grad_h_n[at]) : 0.f;
    dc[i] = known && layer.grad_c_n ? to_float(layer.grad_c_n[at]) : 0.f;
    const Element* first_state = cell == Cell::kLstm ? layer.cx : layer.hx;
    initial[i] = known && first_state ? to_float(first_state[at]) : 0.f;
    const int t = tile.time(0, true);
    c[i] = cell == Cell::kLstm && t < length[i] ? layer.c[(first_row + tile.row(t) + column[i]) * H + unit[i]] : 0.f;
  }

  // Whether the step after `step` (the one before in the direction's order) exists for the i-th cell.
  const auto has_previous = [&](int step, int i) {
    return step + 1 < tile.steps && tile.time(step + 1, true) < length[i];
  };
  // A step's saved values, as they are in memory: a conversion would wait for the load.
  Element coming_gate[kOwn][max_of(Plan::kSavedPlanes, 1)], coming_grad[kOwn];
  typename Plan::State coming_state[kOwn];
  const auto fetch = [&](int step) {
    if (step >= tile.steps) return;
    const int t = tile.time(step, true);
    const int64_t row = tile.row(t), previous_row = tile.row(tile.time(step + 1, true));
    const auto output = [&](const Element* rows, int64_t r, int i) {
      return rows[((r + column[i]) * layer.directions + direction) * H + unit[i]];
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      if (t < length[i]) {
#pragma unroll
        for (int m = 0; m < Plan::kSavedPlanes; ++m)
          coming_gate[i][m] = layer.gates[((first_row + row + column[i]) * Plan::kSavedPlanes + m) * H + unit[i]];
        if (layer.grad_output) coming_grad[i] = output(layer.grad_output, row, i);
        if constexpr (cell == Cell::kRnn) coming_state[i] = output(layer.output, row, i);
      }
      if (cell != Cell::kRnn && has_previous(step, i)) {
        if constexpr (cell == Cell::kLstm)
          coming_state[i] = layer.c[(first_row + previous_row + column[i]) * H + unit[i]];
        else
          coming_state[i] = output(layer.output, previous_row, i);
      }
    }
  };
  fetch(0);

  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step, true);
    const int64_t row = first_row + tile.row(t);
    unsigned char* const slot = slots + int64_t(step) * Slots::kSlotBytes;
    float carry[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const bool active = t < length[i];
      const float hidden = dh[i] + (active && layer.grad_output ? to_float(coming_grad[i]) : 0.f);
      const float state = cell == Cell::kRnn || has_previous(step, i) ? to_float(coming_state[i]) : initial[i];
      float g[4], grad[4];
#pragma unroll
      for (int m = 0; m < Plan::kSavedPlanes; ++m) g[m] = to_float(coming_gate[i][m]);
      if constexpr (cell == Cell::kRnn) {
        grad[0] = Plan::Maths::rnn_backward(hidden, state, layer.relu);
      } else if constexpr (cell == Cell::kGru) {
        const auto d = Plan::Maths::gru_backward(hidden, g[0], g[1], g[2], g[3], state);
        grad[0] = d.n_x, grad[1] = d.r, grad[2] = d.z, grad[3] = d.n_h;
        carry[i] = d.carry;
      } else {
        const auto d = Plan::Maths::lstm_backward(hidden, dc[i], g[0], g[1], g[2], g[3], c[i], state);
        grad[0] = d.i, grad[1] = d.f, grad[2] = d.g, grad[3] = d.o;
        dc[i] = active ? d.dc : dc[i];
        c[i] = has_previous(step, i) ? state : c[i];
      }
      constexpr int kFirst = Plan::kGradPlanes - Plan::kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
      for (int m = 0; m < Plan::kGates; ++m)
        Slots::template store<Cells::kNeighbour>(slot, column[i], m, unit[i], active ? grad[kFirst + m] : 0.f);
      if (!active) continue;
#pragma unroll
      for (int m = 0; m < Plan::kGradPlanes; ++m)
        layer.grad_gates[((row + column[i]) * Plan::kGradPlanes + m) * H + unit[i]] = from_float<Element>(grad[m]);
    }

    typename Slots::Reader gate_grads(slot, lane, covered);
    fetch(step + 1);
    unsigned char* const half = shared + Plan::kSums + step % 2 * Plan::Sums::kHalfBytes;
    {
      float sum[Plan::kTiles][4];
      recurrent.multiply(sum, gate_grads);
      Plan::Sums::store(half, lane, sum);
    }
    block_sync();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const float sum = Plan::Sums::load(half, Cells::block(i), Cells::place(i));
      if (t < length[i]) dh[i] = cell == Cell::kGru ? sum + carry[i] : sum;
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i) || unit[i] >= H || tile.first + column[i] >= tile.batch) continue;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + column[i]) * H + unit[i];
    layer.grad_hx[at] = from_float<Element>(dh[i]);
    if constexpr (cell == Cell::kLstm) layer.grad_cx[at] = from_float<Element>(dc[i]);
  }
  Lane of_group = lane;  // the members share the rows that no sequence has
  of_group.warp += int(blockIdx.x) * kWarps;
  const int64_t grads = int64_t(Plan::kGradPlanes) * H;
  zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, of_group, int(gridDim.x) * kWarps);
}

}  // namespace rnnfast::cuda
