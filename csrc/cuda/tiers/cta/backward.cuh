// Tier CTA, backward: the whole recurrence of 8 sequences and one direction in one CTA, against the direction's time.
//
// Shapes      grad_output [N, D*P], gates [D, N, 4*H], c [D, N, H] -> grad_gates [D, N, planes*H], grad_hx, grad_cx
//             and so on; see layer.h. Grid: x = batch tiles of 8, y = directions.
// Limits      As in tier_cta_fwd.cuh: W_hh^T is as large as W_hh.
// Ownership   A warp owns 16 units (32 where H > 128), a lane 2 units x 2 sequences of them with all their gate
//             gradients. W_hh^T is the a operand of mma (rows: units of h; depth: all gates of all units), in
//             registers for the whole sequence; dh, dc and c are in registers (float); gate gradients pass through
//             shared memory as the b operand, double-buffered.
// Projection  dh is that of the projected h, P units. It passes through shared memory first, and W_hr^T, read from
//             there too, for registers are full, gives the gradient of o tanh(c).
// One step    gates, c or h', grad_output from the ring, cell, gate gradients to shared and global memory | barrier |
//             dh = W_hh^T dgates (mma). With a projection, the product with W_hr^T and a barrier before it come first.
//             In the shadow of the product cp.async fetches what kStages steps ahead need.
// Barrier     One per step: a buffer of gate gradients is written again two steps later, after a barrier that follows
//             its reads; a slot of the ring is refilled after the barrier that follows its reads.
// Stored      grad_gates and, projected, the gradient of the projected h: the gradients of weights, biases and x are
//             products over all rows afterwards.
// c' and h'   belong to the step before, so the ring brings them from the row that comes next, and LSTM keeps c for a
//             step. At a sequence's first step they are cx and hx, which lie in a stage of their own.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cta/cta.h"

namespace rnnfast::cuda {

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
struct CtaBackward {
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ExactMath>;
  static constexpr int kStages = ring_stages(arithmetic);
  static constexpr int kGates = gate_count(cell);  // planes that multiply W_hh
  static constexpr int kSavedPlanes = saved_planes(cell);
  static constexpr int kGradPlanes = grad_planes(cell);  // planes in memory
  static constexpr int kBlocks = kHidden > 128 ? 2 : 1;  // of 16 units per warp
  static constexpr int kWarps = kHidden / (kTileRows * kBlocks);
  static constexpr int kThreads = kWarps * kLanes;
  static_assert(!kProjected || (cell == Cell::kLstm && kBlocks == 1));

  using GateGrads = Operand<arithmetic, kGates * kHidden>;
  // What needs registers beside the weights: exact products (sums, high and low parts of gradients), a projection.
  static constexpr int kExactRegisters = ArithmeticTraits<arithmetic>::kParts == 2 && cell != Cell::kRnn ? 48 : 0;
  static constexpr int kBudget = kWeightBudget - max_of(kExactRegisters, kProjected ? 16 : 0);
  using Recurrent = WeightTiles<arithmetic, kBlocks, kGates * kHidden, kWarps, kBudget>;
  using ProjectedGrads = Operand<arithmetic, kHidden>;
  using Projection = WeightTiles<arithmetic, 1, kHidden, kWarps, 0>;
  using Stage = ColumnStage<arithmetic, kHidden>;
  static constexpr int kPlaneChunks = kHidden * int(sizeof(Element)) / kChunkBytes;

  // What the cell's derivative needs: saved gates (not RNN), then LSTM c of the previous step, GRU h of the previous
  // step, RNN h of the step itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;
  using Gates = RowStream<Element, max_of(kSavedPlanes, 1), kHidden, kThreads>;
  using States = RowStream<State, 1, kHidden, kThreads>;
  using Outputs = RowStream<Element, 1, kHidden, kThreads>;

  static constexpr int kStatesAt = cell == Cell::kRnn ? 0 : Gates::kStageBytes;  // within a stage of the ring
  static constexpr int kOutputsAt = kStatesAt + States::kStageBytes;
  static constexpr int kStageBytes = kOutputsAt + Outputs::kStageBytes;

  // Shared memory: weights that are kept there, then (in turn) the stages of weights, or operands and ring.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kGateGrads = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kProjectedGrads = kGateGrads + 2 * GateGrads::kBytes;
  static constexpr int kInitial = kProjectedGrads + (kProjected ? ProjectedGrads::kBytes : 0);  // hx or cx as a stage
  static constexpr int kRing = kInitial + (cell == Cell::kRnn ? 0 : States::kStageBytes);
  static constexpr int kEnd = kRing + kStages * kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kGateGrads + kWarps * Stage::kBytes);
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(CtaBackward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cta_backward(const __grid_constant__ BackwardLayer<ElementOf<arithmetic>> layer) {
  using Plan = CtaBackward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Plan::Element;
  using GateGrads = typename Plan::GateGrads;
  constexpr int kBlocks = Plan::kBlocks, kStages = Plan::kStages;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = layer.output_size;
  const BatchTile tile(layer, int(blockIdx.x), direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;
  const auto unit = [&](int block) {  // the first of the lane's two
    return (lane.warp * kBlocks + block) * kTileRows + 2 * lane.group;
  };

  typename Plan::Recurrent recurrent;
  typename Plan::Projection projection;
  {
    using Stage = typename Plan::Stage;
    unsigned char* const stage = shared + Plan::kGateGrads + lane.warp * Stage::kBytes;
    const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
    recurrent.place(shared, lane);
#pragma unroll
    for (int i = 0; i < kBlocks * Plan::kGates; ++i) {
      const int block = i / Plan::kGates, plane = i % Plan::kGates;
      const int column = (lane.warp * kBlocks + block) * kTileRows;
      Stage::fill(stage, weights.weight_hh + int64_t(plane) * H * P + column, P, H, P - column);
      recurrent.load(block, plane * Plan::kPlaneChunks, Plan::kPlaneChunks, read);
    }
    if constexpr (kProjected) {
      const int column = lane.warp * kTileRows;
      projection.place(shared + Plan::kProjectionWeights, lane);
      Stage::fill(stage, weights.weight_hr + column, H, P, H - column);
      projection.load(0, 0, Plan::kPlaneChunks, read);
    }
  }
  block_sync();
  zero_shared(shared + Plan::kGateGrads, Plan::kEnd - Plan::kGateGrads, Plan::kThreads);
  block_sync();

  // The lane's sequences are columns 2 * member + {0, 1}; arrays of 4 run over [unit half][column], as an mma's sums.
  const int column = 2 * lane.member, sequence = tile.first + column;
  const int lengths[2] = {tile.length(column), tile.length(column + 1)};
  // dh: gradient of the step's output (P units) that comes from the step after it, or from h_n.
  float dh[kBlocks][4], dc[kBlocks][4], c[kBlocks][4];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t b = int64_t(direction) * tile.batch + sequence + j;
      const bool known = sequence + j < tile.batch;
      const float2 zero = {0.f, 0.f};
      const float2 last_dh = known && layer.grad_h_n ? load_pair(layer.grad_h_n + b * P, unit(block), P) : zero;
      const float2 last_dc = known && layer.grad_c_n ? load_pair(layer.grad_c_n + b * H, unit(block), H) : zero;
      dh[block][j] = last_dh.x, dh[block][2 + j] = last_dh.y;
      dc[block][j] = last_dc.x, dc[block][2 + j] = last_dc.y;
      if constexpr (cell != Cell::kRnn) {
        const Element* initial = cell == Cell::kLstm ? layer.cx : layer.hx;  // [D, B, H]
        Plan::States::put(shared + Plan::kInitial, column + j, unit(block),
                          known && initial ? load_pair(initial + b * H, unit(block), H) : zero);
      }
      float2 last_c = zero;
      const int t = tile.first_time(true);
      if (cell == Cell::kLstm && t < lengths[j])
        last_c = load_pair(layer.c + (first_row + tile.row(t) + column + j) * H, unit(block), H);
      c[block][j] = last_c.x, c[block][2 + j] = last_c.y;
    }

  const int outputs = layer.directions * P;
  typename Plan::Gates gate_stream(layer.gates + first_row * Plan::kSavedPlanes * H, Plan::kSavedPlanes * H, H);
  typename Plan::States state_stream = [&] {
    if constexpr (cell == Cell::kLstm)
      return typename Plan::States(layer.c + first_row * H, H, H);
    else
      return typename Plan::States(layer.output + direction * P, outputs, P);
  }();
  typename Plan::Outputs output_stream(layer.grad_output + direction * P, outputs, P);
  gate_stream.piece = keep(gate_stream.piece);  // not found anew, from three addresses, at every step
  state_stream.piece = keep(state_stream.piece);
  output_stream.piece = keep(output_stream.piece);
  const int gate_length = tile.length(Plan::Gates::column()), state_length = tile.length(Plan::States::column());
  const int output_length = tile.length(Plan::Outputs::column());
  const auto stage_of = [&](int step) { return shared + Plan::kRing + step % kStages * Plan::kStageBytes; };
  // row, previous_row: of the step's time, and of the time of the step that forward took before it
  const auto fetch = [&](int step, int64_t row, int64_t previous_row) {
    if (step < tile.steps) {
      const int t = tile.time(step, true);
      if constexpr (cell != Cell::kRnn) gate_stream.fetch(stage_of(step), row, t < gate_length);
      if (layer.grad_output) output_stream.fetch(stage_of(step) + Plan::kOutputsAt, row, t < output_length);
      unsigned char* states = stage_of(step) + Plan::kStatesAt;
      if constexpr (cell == Cell::kRnn)
        state_stream.fetch(states, row, t < state_length);
      else
        state_stream.fetch(states, previous_row, step + 1 < tile.steps && tile.time(step + 1, true) < state_length);
    }
    copy_commit();
  };
  const auto row_of = [&](int step) { return tile.row(tile.time(step, true)); };
  for (int step = 0; step < kStages; ++step) fetch(step, row_of(step), row_of(step + 1));
  copy_wait<kStages - 1>();
  block_sync();

  // Where the lane's pairs go in row 0 of the tile, and whether as words: see tier_cta_fwd.cuh.
  const int grads = Plan::kGradPlanes * H;
  Element* const grads_0 = layer.grad_gates + (first_row + column) * grads + unit(0);
  const bool grads_aligned = keep(pairs_aligned(layer.grad_gates, H)),
             projected_aligned = keep(pairs_aligned(layer.grad_projected, P));
  const int grads_offset = GateGrads::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step, true), previous = tile.time(step + 1, true);
    const int64_t row = tile.row(t);
    Element* const to_grads = grads_0 + row * grads;
    const unsigned char* stage = stage_of(step);
    const bool active[2] = {t < lengths[0], t < lengths[1]};
    const bool has_previous[2] = {step + 1 < tile.steps && previous < lengths[0],
                                  step + 1 < tile.steps && previous < lengths[1]};
    float hidden[kBlocks][4];  // gradient of the cell's h, before the projection
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 from_output = Plan::Outputs::read(stage + Plan::kOutputsAt, column + j, 0, unit(block));
        hidden[block][j] = dh[block][j] + from_output.x;
        hidden[block][2 + j] = dh[block][2 + j] + from_output.y;
      }
    if constexpr (kProjected) {
      unsigned char* projected = shared + Plan::kProjectedGrads;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Plan::ProjectedGrads::store_pair(projected, Plan::ProjectedGrads::offset(column + j, unit(0)), hidden[0][j],
                                         hidden[0][2 + j]);
        if (active[j])
          store_pairs<1>(layer.grad_projected + (first_row + row + column + j) * P + unit(0), 0, P - unit(0),
                         projected_aligned, column_of(hidden[0], j));
      }
      block_sync();
      projection.multiply(hidden, projected, Plan::ProjectedGrads::lane_offset(lane));
    }

    float carry[kBlocks][4];
    unsigned char* const operand = shared + Plan::kGateGrads + step % 2 * GateGrads::kBytes;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int u = unit(block);
        const bool at_first = cell != Cell::kRnn && !has_previous[j];  // or not active
        const unsigned char* states = at_first ? shared + Plan::kInitial : stage + Plan::kStatesAt;
        float2 gate[4], state = Plan::States::read(states, column + j, 0, u);
        if constexpr (cell != Cell::kRnn) {
#pragma unroll
          for (int m = 0; m < 4; ++m) gate[m] = Plan::Gates::read(stage, column + j, m, u);
        }
        float grad[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + j;
          const float s = half ? state.y : state.x;
          float g[4];
#pragma unroll
          for (int m = 0; m < (cell == Cell::kRnn ? 0 : 4); ++m) g[m] = half ? gate[m].y : gate[m].x;
          if constexpr (cell == Cell::kRnn) {
            grad[half][0] = Plan::Maths::rnn_backward(hidden[block][i], s, layer.relu);
          } else if constexpr (cell == Cell::kGru) {
            const auto d = Plan::Maths::gru_backward(hidden[block][i], g[0], g[1], g[2], g[3], s);
            grad[half][0] = d.n_x, grad[half][1] = d.r, grad[half][2] = d.z, grad[half][3] = d.n_h;
            carry[block][i] = d.carry;
          } else {
            const auto d =
                Plan::Maths::lstm_backward(hidden[block][i], dc[block][i], g[0], g[1], g[2], g[3], c[block][i], s);
            grad[half][0] = d.i, grad[half][1] = d.f, grad[half][2] = d.g, grad[half][3] = d.o;
            dc[block][i] = active[j] ? d.dc : dc[block][i];
            c[block][i] = has_previous[j] ? s : c[block][i];
          }
        }
        constexpr int kFirst = Plan::kGradPlanes - Plan::kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
        for (int m = 0; m < Plan::kGates; ++m)
          GateGrads::store_pair(operand, GateGrads::offset(column + j, u, m * Plan::kPlaneChunks), grad[0][kFirst + m],
                                grad[1][kFirst + m]);
        if (active[j] && u < H)
          store_pairs<Plan::kGradPlanes>(to_grads + j * grads + block * kTileRows, H, H - u, grads_aligned,
                                         [&](int m, int half) { return grad[half][m]; });
      }
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();

    float sum[kBlocks][4];
    recurrent.multiply(sum, operand, grads_offset);
    // In the shadow of the product, which is under way now.
    fetch(step + kStages, row_of(step + kStages), row_of(step + kStages + 1));
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float next = cell == Cell::kGru ? sum[block][i] + carry[block][i] : sum[block][i];
        dh[block][i] = active[i % 2] ? next : dh[block][i];
      }
  }

#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (sequence + j >= tile.batch) continue;
      const int64_t b = int64_t(direction) * tile.batch + sequence + j;
      const int u = unit(block);
      store_pairs<1>(layer.grad_hx + b * P + u, 0, P - u, false, column_of(dh[block], j));
      if constexpr (cell == Cell::kLstm)
        store_pairs<1>(layer.grad_cx + b * H + u, 0, H - u, false, column_of(dc[block], j));
    }
  zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, lane, Plan::kWarps);
  if (kProjected) zero_tails(tile, layer.grad_projected + first_row * P, P, P, lane, Plan::kWarps);
}

}  // namespace rnnfast::cuda
