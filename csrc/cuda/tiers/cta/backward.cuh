// Tier CTA, backward: the whole recurrence of 8 sequences and one direction in one CTA, against the direction's time.
//
// Shapes      grad_output [N, D*P], gates [D, N, 4*H], c [D, N, H] -> grad_gates [D, N, planes*H], grad_hx, grad_cx
//             and so on; see layer.h. Grid: x = batch tiles of 8, y = directions.
// Ownership   A warp owns 16 units (32 where H > 128). A lane owns 2 units x 2 sequences with all their gate gradients.
//             W_hh^T is the A operand of mma, in registers for the whole sequence. Its rows are units of h, its depth
//             is all gates of all units. dh, dc and c are float, in registers.
//             Gate gradients pass through shared memory, double-buffered: they are the B operand.
// One step    gates, c or h', grad_output from the ring, cell, gate gradients to shared and global memory | barrier |
//             dh = W_hh^T dgates (mma). During the product, cp.async fetches what kStages steps ahead need.
//             c' and h' belong to the step before, in forward's order. The ring brings them from that step's row, and
//             LSTM keeps c for a step. At a sequence's first step they are cx and hx, in a stage of their own.
// Projection  dh is the gradient of the projected h, P units. First it passes through shared memory, and after a
//             barrier W_hr^T dh gives the gradient of o tanh(c). W_hr^T lies in shared memory: registers are full.
// Sync        One barrier per step, two with a projection. A buffer of gate gradients is written again two steps later,
//             after a barrier that follows its reads. A stage of the ring is refilled after the barrier that follows
//             its reads.
// Saved       grad_gates and, projected, grad_projected. Products over all rows afterwards make the gradients of
//             weights, biases and x from them.
// Limits      As in forward.cuh: W_hh^T is as large as W_hh.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cta/cta.h"

namespace rnnfast::cuda {

// The kernel's sizes and types, and its phases.
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
  // Registers that weights leave: to exact products (sums, high and low parts of gradients), to a projection.
  static constexpr int kExactRegisters = ArithmeticTraits<arithmetic>::kParts == 2 && cell != Cell::kRnn ? 48 : 0;
  static constexpr int kBudget = kWeightBudget - max_of(kExactRegisters, kProjected ? 16 : 0);
  using Recurrent = WeightTiles<arithmetic, kBlocks, kGates * kHidden, kWarps, kBudget>;
  using ProjectedGrads = Operand<arithmetic, kHidden>;
  using Projection = WeightTiles<arithmetic, 1, kHidden, kWarps, 0>;
  using Stage = ColumnStage<arithmetic, kHidden>;
  using Layer = BackwardLayer<Element>;
  using Values = float[kBlocks][4];  // of a lane: [unit half][column] of each block, as an mma's sums
  static constexpr int kPlaneChunks = kHidden * int(sizeof(Element)) / kChunkBytes;

  // The cell's derivative needs saved gates (not RNN) and a state: LSTM c and GRU h of the previous step, RNN h of the
  // step itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;
  using Gates = RowStream<Element, max_of(kSavedPlanes, 1), kHidden, kThreads>;
  using States = RowStream<State, 1, kHidden, kThreads>;
  using Outputs = RowStream<Element, 1, kHidden, kThreads>;

  static constexpr int kStatesAt = cell == Cell::kRnn ? 0 : Gates::kStageBytes;  // within a stage of the ring
  static constexpr int kOutputsAt = kStatesAt + States::kStageBytes;
  static constexpr int kStageBytes = kOutputsAt + Outputs::kStageBytes;

  // Shared memory: the weights that stay there. Behind them, first the stages of weights, later operands and ring.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kGateGrads = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kProjectedGrads = kGateGrads + 2 * GateGrads::kBytes;
  static constexpr int kInitial = kProjectedGrads + (kProjected ? ProjectedGrads::kBytes : 0);  // hx or cx as a stage
  static constexpr int kRing = kInitial + (cell == Cell::kRnn ? 0 : States::kStageBytes);
  static constexpr int kEnd = kRing + kStages * kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kGateGrads + kWarps * Stage::kBytes);

  // The first of a lane's two units of a block.
  static RNNFAST_DEVICE int unit(const Lane& lane, int block) {
    return (lane.warp * kBlocks + block) * kTileRows + 2 * lane.group;
  }

  static RNNFAST_DEVICE void load_weights(Recurrent& recurrent, Projection& projection, const Weights<Element>& weights,
                                          unsigned char* shared, const Lane& lane, int H, int P) {
    unsigned char* const stage = shared + kGateGrads + lane.warp * Stage::kBytes;
    const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
    recurrent.use_shared(shared, lane);
#pragma unroll
    for (int i = 0; i < kBlocks * kGates; ++i) {
      const int block = i / kGates, plane = i % kGates;
      const int column = (lane.warp * kBlocks + block) * kTileRows;
      Stage::fill(stage, weights.weight_hh + int64_t(plane) * H * P + column, P, H, P - column);
      recurrent.load(block, plane * kPlaneChunks, kPlaneChunks, read);
    }
    if constexpr (kProjected) {
      const int column = lane.warp * kTileRows;
      projection.use_shared(shared + kProjectionWeights, lane);
      Stage::fill(stage, weights.weight_hr + column, H, P, H - column);
      projection.load(0, 0, kPlaneChunks, read);
    }
  }

  // Columns column and column + 1 are the lane's sequences. dh: the gradient of the step's output (P units) that comes
  // from the step after it, or from h_n.
  static RNNFAST_DEVICE void init_state(Values& dh, Values& dc, Values& c, const Layer& layer, const BatchTile& tile,
                                        const int (&lengths)[2], unsigned char* shared, const Lane& lane, int direction,
                                        int column, int64_t first_row, int H, int P) {
    const int sequence = tile.first + column;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t b = int64_t(direction) * tile.batch + sequence + j;
        const bool known = sequence + j < tile.batch;
        const float2 zero = {0.f, 0.f};
        const float2 last_dh = known && layer.grad_h_n ? load_pair(layer.grad_h_n + b * P, unit(lane, block), P) : zero;
        const float2 last_dc = known && layer.grad_c_n ? load_pair(layer.grad_c_n + b * H, unit(lane, block), H) : zero;
        dh[block][j] = last_dh.x, dh[block][2 + j] = last_dh.y;
        dc[block][j] = last_dc.x, dc[block][2 + j] = last_dc.y;
        if constexpr (cell != Cell::kRnn) {
          const Element* initial = cell == Cell::kLstm ? layer.cx : layer.hx;  // [D, B, H]
          States::put(shared + kInitial, column + j, unit(lane, block),
                      known && initial ? load_pair(initial + b * H, unit(lane, block), H) : zero);
        }
        float2 last_c = zero;
        const int t = tile.first_time(true);
        if (cell == Cell::kLstm && t < lengths[j])
          last_c = load_pair(layer.c + (first_row + tile.row(t) + column + j) * H, unit(lane, block), H);
        c[block][j] = last_c.x, c[block][2 + j] = last_c.y;
      }
  }

  // The gradient of the projected h goes to the operand of the product with W_hr^T, and to memory.
  static RNNFAST_DEVICE void store_projected(unsigned char* projected, const Layer& layer, const Values& hidden,
                                             const bool (&active)[2], int64_t row, const Lane& lane, int column, int P,
                                             bool aligned) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      ProjectedGrads::store_pair(projected, ProjectedGrads::offset(column + j, unit(lane, 0)), hidden[0][j],
                                 hidden[0][2 + j]);
      if (active[j])
        store_pairs<1>(layer.grad_projected + (row + column + j) * P + unit(lane, 0), 0, P - unit(lane, 0), aligned,
                       column_of(hidden[0], j));
    }
  }

  // Gate gradients of a step go to `operand` and to memory. hidden: the gradient of the cell's h, before the
  // projection.
  static RNNFAST_DEVICE void apply_cell(unsigned char* operand, Values& carry, Values& dc, Values& c,
                                        const Layer& layer, const Values& hidden, const unsigned char* stage,
                                        const unsigned char* shared, const bool (&active)[2],
                                        const bool (&has_previous)[2], Element* to_grads, bool grads_aligned,
                                        const Lane& lane, int column, int H) {
    const int grads = kGradPlanes * H;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int u = unit(lane, block);
        const bool at_first = cell != Cell::kRnn && !has_previous[j];  // or not active
        const unsigned char* states = at_first ? shared + kInitial : stage + kStatesAt;
        float2 gate[4], state = States::read(states, column + j, 0, u);
        if constexpr (cell != Cell::kRnn) {
#pragma unroll
          for (int m = 0; m < 4; ++m) gate[m] = Gates::read(stage, column + j, m, u);
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
            grad[half][0] = Maths::rnn_backward(hidden[block][i], s, layer.relu);
          } else if constexpr (cell == Cell::kGru) {
            const auto d = Maths::gru_backward(hidden[block][i], g[0], g[1], g[2], g[3], s);
            grad[half][0] = d.n_x, grad[half][1] = d.r, grad[half][2] = d.z, grad[half][3] = d.n_h;
            carry[block][i] = d.carry;
          } else {
            const auto d = Maths::lstm_backward(hidden[block][i], dc[block][i], g[0], g[1], g[2], g[3], c[block][i], s);
            grad[half][0] = d.i, grad[half][1] = d.f, grad[half][2] = d.g, grad[half][3] = d.o;
            dc[block][i] = active[j] ? d.dc : dc[block][i];
            c[block][i] = has_previous[j] ? s : c[block][i];
          }
        }
        constexpr int kFirst = kGradPlanes - kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
        for (int m = 0; m < kGates; ++m)
          GateGrads::store_pair(operand, GateGrads::offset(column + j, u, m * kPlaneChunks), grad[0][kFirst + m],
                                grad[1][kFirst + m]);
        if (active[j] && u < H)
          store_pairs<kGradPlanes>(to_grads + j * grads + block * kTileRows, H, H - u, grads_aligned,
                                   [&](int m, int half) { return grad[half][m]; });
      }
  }

  static RNNFAST_DEVICE void store_final(const Layer& layer, const Values& dh, const Values& dc, const BatchTile& tile,
                                         const Lane& lane, int direction, int column, int64_t first_row, int H, int P) {
    const int sequence = tile.first + column, grads = kGradPlanes * H;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (sequence + j >= tile.batch) continue;
        const int64_t b = int64_t(direction) * tile.batch + sequence + j;
        const int u = unit(lane, block);
        store_pairs<1>(layer.grad_hx + b * P + u, 0, P - u, false, column_of(dh[block], j));
        if constexpr (cell == Cell::kLstm)
          store_pairs<1>(layer.grad_cx + b * H + u, 0, H - u, false, column_of(dc[block], j));
      }
    zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, lane, kWarps);
    if (kProjected) zero_tails(tile, layer.grad_projected + first_row * P, P, P, lane, kWarps);
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(CtaBackward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cta_backward(const __grid_constant__ BackwardLayer<ElementOf<arithmetic>> layer) {
  using Traits = CtaBackward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Traits::Element;
  using GateGrads = typename Traits::GateGrads;
  constexpr int kBlocks = Traits::kBlocks, kStages = Traits::kStages;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = layer.output_size;
  const BatchTile tile(layer, int(blockIdx.x), direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;

  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  Traits::load_weights(recurrent, projection, weights, shared, lane, H, P);
  block_sync();
  zero_shared(shared + Traits::kGateGrads, Traits::kEnd - Traits::kGateGrads, Traits::kThreads);
  block_sync();

  const int column = 2 * lane.member;
  const int lengths[2] = {tile.length(column), tile.length(column + 1)};
  typename Traits::Values dh, dc, c;
  Traits::init_state(dh, dc, c, layer, tile, lengths, shared, lane, direction, column, first_row, H, P);

  const int outputs = layer.directions * P;
  typename Traits::Gates gate_stream(layer.gates + first_row * Traits::kSavedPlanes * H, Traits::kSavedPlanes * H, H);
  typename Traits::States state_stream = [&] {
    if constexpr (cell == Cell::kLstm)
      return typename Traits::States(layer.c + first_row * H, H, H);
    else
      return typename Traits::States(layer.output + direction * P, outputs, P);
  }();
  typename Traits::Outputs output_stream(layer.grad_output + direction * P, outputs, P);
  gate_stream.piece = keep(gate_stream.piece);  // or every step finds it anew, from three addresses
  state_stream.piece = keep(state_stream.piece);
  output_stream.piece = keep(output_stream.piece);
  const int gate_length = tile.length(Traits::Gates::column()), state_length = tile.length(Traits::States::column());
  const int output_length = tile.length(Traits::Outputs::column());
  const auto stage_of = [&](int step) { return shared + Traits::kRing + step % kStages * Traits::kStageBytes; };
  // row: of the step's time. previous_row: of the step that forward took before it.
  const auto fetch = [&](int step, int64_t row, int64_t previous_row) {
    if (step < tile.steps) {
      const int t = tile.time(step, true);
      if constexpr (cell != Cell::kRnn) gate_stream.fetch(stage_of(step), row, t < gate_length);
      if (layer.grad_output) output_stream.fetch(stage_of(step) + Traits::kOutputsAt, row, t < output_length);
      unsigned char* states = stage_of(step) + Traits::kStatesAt;
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

  // Computed before the loop and kept: see Targets in forward.cuh.
  const int grads = Traits::kGradPlanes * H;
  Element* const grads_0 = layer.grad_gates + (first_row + column) * grads + Traits::unit(lane, 0);
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
    typename Traits::Values hidden;  // gradient of the cell's h
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float2 from_output =
            Traits::Outputs::read(stage + Traits::kOutputsAt, column + j, 0, Traits::unit(lane, block));
        hidden[block][j] = dh[block][j] + from_output.x;
        hidden[block][2 + j] = dh[block][2 + j] + from_output.y;
      }
    if constexpr (kProjected) {
      unsigned char* const projected = shared + Traits::kProjectedGrads;
      Traits::store_projected(projected, layer, hidden, active, first_row + row, lane, column, P, projected_aligned);
      block_sync();
      projection.multiply(hidden, projected, Traits::ProjectedGrads::lane_offset(lane));
    }

    typename Traits::Values carry;
    unsigned char* const operand = shared + Traits::kGateGrads + step % 2 * GateGrads::kBytes;
    Traits::apply_cell(operand, carry, dc, c, layer, hidden, stage, shared, active, has_previous, to_grads,
                       grads_aligned, lane, column, H);
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();

    float sum[kBlocks][4];
    recurrent.multiply(sum, operand, grads_offset);
    // While the product is under way.
    fetch(step + kStages, row_of(step + kStages), row_of(step + kStages + 1));
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float next = cell == Cell::kGru ? sum[block][i] + carry[block][i] : sum[block][i];
        dh[block][i] = active[i % 2] ? next : dh[block][i];
      }
  }

  Traits::store_final(layer, dh, dc, tile, lane, direction, column, first_row, H, P);
}

}  // namespace rnnfast::cuda
