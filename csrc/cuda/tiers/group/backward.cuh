// Tier group, backward: the recurrence of 8 sequences and one direction, against its time, in a group of CTAs.
//
// Shapes      As in forward.cuh. Grid: x = members, 16 units (RNN 32) each; y = groups, from first_group on.
// Ownership   A CTA computes dh of its units. So it has their columns of W_hh as the A operand of mma; the depth is all
//             gates of all units. Registers hold them, the rest lies in shared memory. A warp has kHidden / kWarps
//             units of every gate as its slice of the depth. A thread owns cells as in forward: dh, dc and c stay in
//             its registers (float).
// One step    cells: gate gradients | to the exchange and to memory | wait for this warp's slice of them | partial sums
//             = W_hh^T dgates (mma) | to shared memory | barrier | dh: sum over warps in their order.
//             The next step's saved values are loaded before the wait for gate gradients.
//             c' and h' belong to the step before in the direction's order; at a sequence's first step they are cx and
//             hx. LSTM keeps c for one step.
// Projection  dh is the gradient of the projected h. The first P / 16 members own 16 of its units each, with their
//             columns of W_hh. The others receive no gate gradients and multiply zeros meanwhile. Every member has the
//             rows of W_hr^T of its own units.
//             A step begins with: dh to the exchange and to memory | wait for this warp's slice of it | partial sums =
//             W_hr^T dh | barrier. Their sum is the gradient of o tanh(c), with which the cells begin.
// Sync        Exchange (exchange.cuh): slot s holds the gate gradients of step s, the planes that W_hh multiplies.
//             Projected, dh of step s lies behind them. One barrier per step, as in forward.cuh.
// Saved       grad_gates (planes as in csrc/common/cell.h) and, projected, grad_projected. Products over all rows
//             afterwards make the gradients of weights, biases and x from them.
// Limits      The exchange is G times forward's. Why partial dh are not sent instead: docs/design/cuda.md.
#pragma once

#include "cuda/tiers/group/forward.cuh"

namespace rnnfast::cuda {

// The kernel's sizes and types, and its phases. kProjection: the padded P; 0 where there is no projection.
template <Arithmetic arithmetic, Cell cell, int kHidden, int kProjection, int kWarps>
struct GroupBackward {
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ExactMath>;
  static constexpr bool kProjected = kProjection > 0;
  static constexpr int kGates = gate_count(cell);  // planes that multiply W_hh
  static constexpr int kSavedPlanes = saved_planes(cell);
  static constexpr int kGradPlanes = grad_planes(cell);  // planes in memory
  static constexpr int kLargestHidden = kHidden;
  static constexpr int kLargestOutput = kProjected ? kProjection : kHidden;
  static constexpr int kUnits = group_units(cell);
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kTiles = kUnits / kTileRows;
  // Units of a warp's slice: of gate gradients, and of the projected h's gradient.
  static constexpr int kDepth = kHidden / kWarps, kProjectionDepth = kLargestOutput / kWarps;
  static_assert(!kProjected || (cell == Cell::kLstm && kProjection <= kHidden));

  using Slots = Exchange<arithmetic, kGates, kHidden, kWarps>;
  using Projected = Exchange<arithmetic, 1, kLargestOutput, kWarps>;
  static constexpr int kStepBytes = Slots::kSlotBytes + (kProjected ? Projected::kSlotBytes : 0);
  // Registers that the weights leave. Exact products need them for more sums and the low parts of gate gradients.
  // Weights that exceed the budget, and a projection, need some for weights on their way from shared memory.
  static constexpr int kWords = kTiles * kGates * kDepth * int(sizeof(Element)) / kChunkBytes * 8;  // of a lane
  static constexpr int kSharedReserve = kProjected ? 24 : kWords > kWeightBudget ? 16 : 0;
  static constexpr int kReserve = ArithmeticTraits<arithmetic>::kParts == 2 ? 48 : kSharedReserve;
  using Recurrent = WeightTiles<arithmetic, kTiles, kGates * kDepth, kWarps, kWeightBudget - kReserve>;
  static constexpr int kProjectionBudget = max_of(kWeightBudget - kReserve - Recurrent::kWords, 0);
  using Projection = WeightTiles<arithmetic, 1, kProjectionDepth, kWarps, kProjectionBudget>;
  using Sums = PartialSums<kTiles, kWarps>;
  using ProjectionSums = PartialSums<1, kWarps>;
  using Cells = CellPlaces<kUnits, kThreads>;
  using Layer = BackwardLayer<Element>;
  static constexpr int kOwn = Cells::kOwn;  // cells of a thread
  // Two sets of weights in shared memory leave less for the stages: half of the depth at a time.
  static constexpr int kStageDepth = kProjected ? kDepth / 2 : kDepth;
  using Stage = ColumnStage<arithmetic, kStageDepth>;
  static constexpr int kStageChunks = kStageDepth * int(sizeof(Element)) / kChunkBytes;
  // The cell's derivative needs a state beside the gates: LSTM c and GRU h of the step before, RNN h of the step
  // itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;

  // Shared memory: the weights that stay there. Behind them, first the stages of weights, later partial sums.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kSums = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kProjectionSums = kSums + Sums::kHalfBytes;  // in place of the second half
  static constexpr int kSumsBytes = Sums::kHalfBytes + (kProjected ? ProjectionSums::kHalfBytes : Sums::kHalfBytes);
  static constexpr int kStages = kWarps * Stage::kBytes;
  static constexpr int kSharedBytes = kSums + max_of(kSumsBytes, kStages);

  // Whether h has this unit.
  static RNNFAST_DEVICE bool is_output(int unit, int P) { return !kProjected || unit < P; }

  static RNNFAST_DEVICE void load_weights(Recurrent& recurrent, Projection& projection, const Weights<Element>& weights,
                                          unsigned char* shared, const Lane& lane, int first_unit, int H, int P) {
    recurrent.use_shared(shared, lane);
    unsigned char* const stage = shared + kSums + lane.warp * Stage::kBytes;
    const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
    constexpr int kParts = kDepth / kStageDepth;  // of a plane
#pragma unroll
    for (int i = 0; i < kTiles * kGates * kParts; ++i) {
      const int block = i / kParts / kGates, plane = i / kParts % kGates, part = i % kParts;
      const int u = first_unit + block * kTileRows, k = lane.warp * kDepth + part * kStageDepth;
      Stage::fill(stage, weights.weight_hh + (int64_t(plane) * H + k) * P + u, P, min(H - k, kStageDepth), P - u);
      recurrent.load(block, plane * Slots::kPlaneChunks + part * kStageChunks, kStageChunks, read);
    }
    if constexpr (kProjected) {
      projection.use_shared(shared + kProjectionWeights, lane);
#pragma unroll
      for (int from = 0; from < kProjectionDepth; from += kStageDepth) {
        const int k = lane.warp * kProjectionDepth + from;
        Stage::fill(stage, weights.weight_hr + int64_t(k) * H + first_unit, H,
                    min(P - k, min(kProjectionDepth, kStageDepth)), H - first_unit);
        projection.load(0, from / kStageDepth * kStageChunks, min_of(Projection::kChunks, kStageChunks), read);
      }
    }
  }

  // dh: the gradient of the step's output that comes from the step after it, or from h_n. initial: cx or hx.
  static RNNFAST_DEVICE void init_cell(float& dh, float& dc, float& c, float& initial, const Layer& layer,
                                       const BatchTile& tile, int direction, int unit, int column, int length,
                                       int64_t first_row, int H, int P) {
    const bool known = unit < H && tile.first + column < tile.batch;
    const int64_t b = int64_t(direction) * tile.batch + tile.first + column;
    const int64_t at_h = b * P + unit, at_c = b * H + unit;
    dh = known && is_output(unit, P) && layer.grad_h_n ? to_float(layer.grad_h_n[at_h]) : 0.f;
    dc = known && layer.grad_c_n ? to_float(layer.grad_c_n[at_c]) : 0.f;
    const Element* first_state = cell == Cell::kLstm ? layer.cx : layer.hx;
    initial = known && first_state ? to_float(first_state[at_c]) : 0.f;
    const int t = tile.first_time(true);
    c = cell == Cell::kLstm && t < length ? layer.c[(first_row + tile.row(t) + column) * H + unit] : 0.f;
  }

  // The gate gradients of a cell. hidden: the gradient of its h, before the projection. state: see State.
  static RNNFAST_DEVICE void apply_cell(float (&grad)[4], float& carry, float& dc, float& c,
                                        const Element (&gate)[max_of(kSavedPlanes, 1)], float hidden, float state,
                                        bool relu, bool active, bool has_previous) {
    float g[4];
#pragma unroll
    for (int m = 0; m < kSavedPlanes; ++m) g[m] = to_float(gate[m]);
    if constexpr (cell == Cell::kRnn) {
      grad[0] = Maths::rnn_backward(hidden, state, relu);
    } else if constexpr (cell == Cell::kGru) {
      const auto d = Maths::gru_backward(hidden, g[0], g[1], g[2], g[3], state);
      grad[0] = d.n_x, grad[1] = d.r, grad[2] = d.z, grad[3] = d.n_h;
      carry = d.carry;
    } else {
      const auto d = Maths::lstm_backward(hidden, dc, g[0], g[1], g[2], g[3], c, state);
      grad[0] = d.i, grad[1] = d.f, grad[2] = d.g, grad[3] = d.o;
      dc = active ? d.dc : dc;
      c = has_previous ? state : c;
    }
  }

  static RNNFAST_DEVICE void store_final(const Layer& layer, const float (&dh)[kOwn], const float (&dc)[kOwn],
                                         const int (&unit)[kOwn], const int (&column)[kOwn], const BatchTile& tile,
                                         const Lane& lane, int direction, int64_t first_row, int H, int P) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i) || unit[i] >= H || tile.first + column[i] >= tile.batch) continue;
      const int64_t b = int64_t(direction) * tile.batch + tile.first + column[i];
      const int64_t at_h = b * P + unit[i], at_c = b * H + unit[i];
      if (is_output(unit[i], P)) layer.grad_hx[at_h] = from_float<Element>(dh[i]);
      if constexpr (cell == Cell::kLstm) layer.grad_cx[at_c] = from_float<Element>(dc[i]);
    }
    Lane of_group = lane;  // the members share the rows that no sequence has
    of_group.warp += int(blockIdx.x) * kWarps;
    const int64_t grads = int64_t(kGradPlanes) * H;
    const int warps = int(gridDim.x) * kWarps;
    zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, of_group, warps);
    if (kProjected) zero_tails(tile, layer.grad_projected + first_row * P, P, P, of_group, warps);
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, int kProjection, int kWarps>
__global__ void __launch_bounds__(GroupBackward<arithmetic, cell, kHidden, kProjection, kWarps>::kThreads, 1)
    group_backward(const __grid_constant__ BackwardLayer<ElementOf<arithmetic>> layer, unsigned char* exchange,
                   int first_group) {
  using Traits = GroupBackward<arithmetic, cell, kHidden, kProjection, kWarps>;
  using Element = typename Traits::Element;
  using Cells = typename Traits::Cells;
  using Slots = typename Traits::Slots;
  using Projected = typename Traits::Projected;
  constexpr bool kProjected = Traits::kProjected;
  constexpr int kOwn = Traits::kOwn;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int group = first_group + int(blockIdx.y), direction = group % layer.directions, H = layer.hidden_size;
  const int P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, group / layer.directions, direction);
  const int64_t first_row = int64_t(direction) * layer.rows;
  const int first_unit = int(blockIdx.x) * Traits::kUnits;
  const bool has_outputs = !kProjected || first_unit < P;  // whether this member has units of h
  const int covered =
      has_outputs ? round_up(H, Traits::kUnits) : 0;          // units whose gate gradients this member waits for
  const int covered_projected = round_up(P, Traits::kUnits);  // units of the projected h that some member sends
  unsigned char* const slots = exchange + int64_t(group) * layer.steps * Traits::kStepBytes;

  const Weights<Element>& weights = layer.weights[direction];
  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  Traits::load_weights(recurrent, projection, weights, shared, lane, first_unit, H, P);
  block_sync();

  int unit[kOwn], column[kOwn], length[kOwn];
  float dh[kOwn], dc[kOwn], c[kOwn], initial[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i)) continue;
    unit[i] = first_unit + Cells::unit(i), column[i] = Cells::column(i);
    length[i] = unit[i] < H ? tile.length(column[i]) : 0;  // units of the padding send zeros
    Traits::init_cell(dh[i], dc[i], c[i], initial[i], layer, tile, direction, unit[i], column[i], length[i], first_row,
                      H, P);
  }

  // Whether the step after `step` (the one before in the direction's order) exists for the i-th cell.
  const auto has_previous = [&](int step, int i) {
    return step + 1 < tile.steps && tile.time(step + 1, true) < length[i];
  };
  // The coming step's saved values, as in memory: a conversion would wait for the load.
  Element coming_gate[kOwn][max_of(Traits::kSavedPlanes, 1)], coming_grad[kOwn];
  typename Traits::State coming_state[kOwn];
  const auto fetch = [&](int step) {
    if (step >= tile.steps) return;
    const int t = tile.time(step, true);
    const int64_t row = tile.row(t), previous_row = tile.row(tile.time(step + 1, true));
    const auto output = [&](const Element* rows, int64_t r, int i) {
      return rows[((r + column[i]) * layer.directions + direction) * P + unit[i]];
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      if (t < length[i]) {
#pragma unroll
        for (int m = 0; m < Traits::kSavedPlanes; ++m)
          coming_gate[i][m] = layer.gates[((first_row + row + column[i]) * Traits::kSavedPlanes + m) * H + unit[i]];
        if (layer.grad_output && Traits::is_output(unit[i], P)) coming_grad[i] = output(layer.grad_output, row, i);
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
    unsigned char* const slot = slots + int64_t(step) * Traits::kStepBytes;
    // Gradient of the i-th cell's output.
    const auto grad_of_output = [&](int i, bool active) {
      return dh[i] + (active && layer.grad_output ? to_float(coming_grad[i]) : 0.f);
    };
    if constexpr (kProjected) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (!Cells::exists(i) || !has_outputs) continue;
        const bool active = t < length[i] && Traits::is_output(unit[i], P);
        const float grad = grad_of_output(i, active);
        Projected::template store<Cells::kNeighbour>(slot + Slots::kSlotBytes, column[i], 0, unit[i],
                                                     active ? grad : 0.f);
        if (active) layer.grad_projected[(row + column[i]) * P + unit[i]] = from_float<Element>(grad);
      }
      typename Projected::Reader projected(slot + Slots::kSlotBytes, lane, covered_projected);
      float sum[1][4];
      projection.multiply(sum, projected);
      Traits::ProjectionSums::store(shared + Traits::kProjectionSums, lane, sum);
      block_sync();
    }

    float carry[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const bool active = t < length[i];
      float hidden;  // gradient of the cell's h
      if constexpr (kProjected)
        hidden = Traits::ProjectionSums::load(shared + Traits::kProjectionSums, Cells::block(i), Cells::place(i));
      else
        hidden = grad_of_output(i, active);
      const float state = cell == Cell::kRnn || has_previous(step, i) ? to_float(coming_state[i]) : initial[i];
      float grad[4];
      Traits::apply_cell(grad, carry[i], dc[i], c[i], coming_gate[i], hidden, state, layer.relu, active,
                         has_previous(step, i));
      constexpr int kFirst = Traits::kGradPlanes - Traits::kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
      for (int m = 0; m < Traits::kGates; ++m)
        Slots::template store<Cells::kNeighbour>(slot, column[i], m, unit[i], active ? grad[kFirst + m] : 0.f);
      if (!active) continue;
#pragma unroll
      for (int m = 0; m < Traits::kGradPlanes; ++m)
        layer.grad_gates[((row + column[i]) * Traits::kGradPlanes + m) * H + unit[i]] = from_float<Element>(grad[m]);
    }

    typename Slots::Reader gate_grads(slot, lane, covered);
    fetch(step + 1);
    unsigned char* const half = shared + Traits::kSums + (kProjected ? 0 : step % 2 * Traits::Sums::kHalfBytes);
    {
      float sum[Traits::kTiles][4];
      recurrent.multiply(sum, gate_grads);
      Traits::Sums::store(half, lane, sum);
    }
    block_sync();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const float sum = Traits::Sums::load(half, Cells::block(i), Cells::place(i));
      if (t < length[i]) dh[i] = cell == Cell::kGru ? sum + carry[i] : sum;
    }
  }

  Traits::store_final(layer, dh, dc, unit, column, tile, lane, direction, first_row, H, P);
}

}  // namespace rnnfast::cuda
