// Tier CTA, forward: the whole recurrence of 8 sequences and one direction in one CTA, W_hh in its registers.
//
// Shapes      gates_x [D, N, G*H] -> output [N, D*P], h_n [D, B, P], c_n [D, B, H]; see layer.h.
//             Grid: x = batch tiles of 8, y = directions.
// Limits      H <= kHidden: 32, 64, 96, 128 (RNN to 256), in float 32, 64 (RNN 128): a lane's 255 registers take 128 of
//             weights, and 8 warps at most have so many. Padding is zero weights and zero gates_x: padded units stay 0.
// Ownership   A warp owns 16 units (32 where H > 128) and all their gates, a lane 2 units x 2 sequences of them. W_hh
// is
//             the a operand of mma, for the whole sequence; h and c are in registers of the lane that computes them
//             (float), h also in shared memory as the b operand, double-buffered.
// Projection  o tanh(c) passes through shared memory too: a warp's 16 units become its 16 rows of W_hr; h has P units.
// One step    sum = W_hh h (mma) | gates_x from the ring, cell, h to the other buffer | barrier. With a projection, a
//             barrier and the product with W_hr come before h. In the shadow of the first product cp.async fetches the
//             gates_x of kStages - 1 steps ahead.
// Barrier     One per step: the buffer that a step writes was last read in the step before, and so was the slot of the
//             ring that it refills; the barrier between the two steps comes after those reads.
// Saved       Training stores the activated gates (LSTM: in place of gates_x, if the host wishes; a row is read before
//             it is written) and c; inference nothing.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cta/cta.h"

namespace rnnfast::cuda {

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
struct CtaForward {
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ForwardMath<Element>>;
  static constexpr int kStages = ring_stages(arithmetic);
  static constexpr int kGates = gate_count(cell);
  static constexpr int kBlocks = kHidden > 128 ? 2 : 1;  // of 16 units per warp
  static constexpr int kWarps = kHidden / (kTileRows * kBlocks);
  static constexpr int kThreads = kWarps * kLanes;
  static_assert(!kProjected || (cell == Cell::kLstm && kBlocks == 1));

  using State = Operand<arithmetic, kHidden>;
  using Gates = RowStream<Element, kGates, kHidden, kThreads>;
  // Exact products of 4 gates need 48 registers more beside the weights, for more sums.
  static constexpr int kBudget = kWeightBudget - (ArithmeticTraits<arithmetic>::kParts == 2 && kGates == 4 ? 48 : 0);
  using Recurrent = WeightTiles<arithmetic, kGates * kBlocks, kHidden, kWarps, kBudget>;
  static constexpr int kProjectionBudget = max_of(kBudget - Recurrent::kWords, 0);  // what W_hh leaves
  using Projection = WeightTiles<arithmetic, 1, kHidden, kWarps, kProjectionBudget>;
  using Stage = RowStage<arithmetic, kHidden>;

  // Shared memory: weights that are kept there, then (in turn) the stages of weights, or operands and ring.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kStates = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kUnprojected = kStates + 2 * State::kBytes;
  static constexpr int kRing = kUnprojected + (kProjected ? State::kBytes : 0);
  static constexpr int kEnd = kRing + kStages * Gates::kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kStates + kWarps * Stage::kBytes);
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(CtaForward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cta_forward(const __grid_constant__ ForwardLayer<ElementOf<arithmetic>> layer) {
  using Plan = CtaForward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Plan::Element;
  using State = typename Plan::State;
  constexpr int kGates = Plan::kGates, kBlocks = Plan::kBlocks, kStages = Plan::kStages;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = layer.output_size;
  const BatchTile tile(layer, int(blockIdx.x), direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const auto unit = [&](int block) {                          // the first of the lane's two
    return (lane.warp * kBlocks + block) * kTileRows + 2 * lane.group;
  };

  typename Plan::Recurrent recurrent;
  typename Plan::Projection projection;
  {
    using Stage = typename Plan::Stage;
    unsigned char* const stage = shared + Plan::kStates + lane.warp * Stage::kBytes;
    const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
    recurrent.place(shared, lane);
#pragma unroll
    for (int i = 0; i < kGates * kBlocks; ++i) {
      const int row = (lane.warp * kBlocks + i / kGates) * kTileRows;
      Stage::fill(stage, weights.weight_hh + (int64_t(i % kGates) * H + row) * P, H - row, P);
      recurrent.load(i, 0, Plan::Recurrent::kChunks, read);
    }
    if constexpr (kProjected) {
      const int row = lane.warp * kTileRows;
      projection.place(shared + Plan::kProjectionWeights, lane);
      Stage::fill(stage, weights.weight_hr + int64_t(row) * H, P - row, H);
      projection.load(0, 0, Plan::Projection::kChunks, read);
    }
  }
  block_sync();
  zero_shared(shared + Plan::kStates, Plan::kEnd - Plan::kStates, Plan::kThreads);
  block_sync();

  // The lane's sequences are columns 2 * member + {0, 1}; arrays of 4 run over [unit half][column], as an mma's sums.
  const int column = 2 * lane.member, sequence = tile.first + column;
  const int lengths[2] = {tile.length(column), tile.length(column + 1)};
  float h[kBlocks][4], c[kBlocks][4];
  float2 bias_hn[kBlocks];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int u = unit(block);
    bias_hn[block] = weights.bias_hn ? load_pair(weights.bias_hn, u, H) : float2{0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t b = int64_t(direction) * tile.batch + sequence + j;
      const bool known = sequence + j < tile.batch;
      const float2 first_h = known && layer.hx ? load_pair(layer.hx + b * P, u, P) : float2{0.f, 0.f};
      const float2 first_c = known && layer.cx ? load_pair(layer.cx + b * H, u, H) : float2{0.f, 0.f};
      h[block][j] = first_h.x, h[block][2 + j] = first_h.y;
      c[block][j] = first_c.x, c[block][2 + j] = first_c.y;
      State::store_pair(shared + Plan::kStates, State::offset(column + j, u), first_h.x, first_h.y);
    }
  }

  const typename Plan::Gates stream(layer.gates_x + first_row * kGates * H, kGates * H, H);
  const int stream_length = tile.length(Plan::Gates::column());
  const auto stage_of = [&](int step) { return shared + Plan::kRing + step % kStages * Plan::Gates::kStageBytes; };
  const auto fetch = [&](int step, int64_t row) {
    if (step < tile.steps) stream.fetch(stage_of(step), row, tile.time(step) < stream_length);
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step, tile.row(tile.time(step)));
  copy_wait<kStages - 2>();
  block_sync();

  // Where the lane's pairs go in row 0 of the tile, and whether as words: known before the loop, or the compiler, short
  // of registers, makes all of it again at every store of every step.
  const int outputs = layer.directions * P, saved = 4 * H;
  const bool saves = cell != Cell::kRnn && layer.gates != nullptr;
  Element* const output_0 = layer.output + int64_t(column) * outputs + direction * P + unit(0);
  Element* const gates_0 = saves ? layer.gates + (first_row + column) * saved + unit(0) : nullptr;
  float* const c_0 = saves && cell == Cell::kLstm ? layer.c + (first_row + column) * H + unit(0) : nullptr;
  const bool aligned =
      keep(pairs_aligned(layer.output, P) && pairs_aligned(layer.gates, H) && pairs_aligned(layer.c, H));
  const int state_offset = State::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step);
    const bool active[2] = {t < lengths[0], t < lengths[1]};
    float sum[kGates * kBlocks][4];
    recurrent.multiply(sum, shared + Plan::kStates + step % 2 * State::kBytes, state_offset);
    // In the shadow of the products, which are under way now.
    const int64_t row = tile.row(t);
    fetch(step + kStages - 1, tile.row(tile.time(step + kStages - 1)));

    // gate[m] is the activated gate m, and for GRU gate[3] is W_hn h + b_hn
    float gate[kBlocks][4][4], value[kBlocks][4];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 x[kGates];
#pragma unroll
        for (int m = 0; m < kGates; ++m) x[m] = Plan::Gates::read(stage_of(step), column + j, m, unit(block));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + j;
          float (&g)[4] = gate[block][i];
#pragma unroll
          for (int m = 0; m < kGates; ++m) g[m] = half ? x[m].y : x[m].x;
#pragma unroll
          for (int m = 0; m < (cell == Cell::kGru ? 2 : kGates); ++m) g[m] += sum[block * kGates + m][i];
          if constexpr (cell == Cell::kRnn) {
            value[block][i] = Plan::Maths::rnn_forward(g[0], layer.relu);
          } else if constexpr (cell == Cell::kGru) {
            g[3] = sum[block * kGates + 2][i] + (half ? bias_hn[block].y : bias_hn[block].x);
            value[block][i] = Plan::Maths::gru_forward(g[0], g[1], g[2], g[3], h[block][i]);
          } else {
            float next_c = c[block][i];
            value[block][i] = Plan::Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
            c[block][i] = active[j] ? next_c : c[block][i];
          }
        }
      }

    if constexpr (kProjected) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        State::store_pair(shared + Plan::kUnprojected, State::offset(column + j, unit(0)), value[0][j],
                          value[0][2 + j]);
      block_sync();
      projection.multiply(value, shared + Plan::kUnprojected, state_offset);
    }

#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        h[block][j] = active[j] ? value[block][j] : h[block][j];
        h[block][2 + j] = active[j] ? value[block][2 + j] : h[block][2 + j];
        State::store_pair(shared + Plan::kStates + (step + 1) % 2 * State::kBytes,
                          State::offset(column + j, unit(block)), h[block][j], h[block][2 + j]);
      }
    const auto store = [&](bool words) {  // one branch for all stores of a step, not one for each
      Element* const to_output = output_0 + row * outputs;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (active[j])
            store_pairs<1>(to_output + j * outputs + block * kTileRows, 0, P - unit(block), words,
                           column_of(h[block], j));
      if (!saves) return;
      Element* const to_gates = gates_0 + row * saved;
      float* const to_c = cell == Cell::kLstm ? c_0 + row * H : nullptr;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (active[j] && unit(block) < H) {
            store_pairs<4>(to_gates + j * saved + block * kTileRows, H, H - unit(block), words,
                           [&](int m, int half) { return gate[block][2 * half + j][m]; });
            if constexpr (cell == Cell::kLstm)
              store_pairs<1>(to_c + j * H + block * kTileRows, 0, H - unit(block), words, column_of(c[block], j));
          }
    };
    if (aligned)
      store(true);
    else
      store(false);
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();
  }

#pragma unroll
  for (int block = 0; block < kBlocks; ++block)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (sequence + j >= tile.batch) continue;
      const int64_t b = int64_t(direction) * tile.batch + sequence + j;
      const int u = unit(block);
      store_pairs<1>(layer.h_n + b * P + u, 0, P - u, false, column_of(h[block], j));
      if constexpr (cell == Cell::kLstm) store_pairs<1>(layer.c_n + b * H + u, 0, H - u, false, column_of(c[block], j));
    }
  zero_tails(tile, layer.output + direction * P, layer.directions * P, P, lane, Plan::kWarps);
  if (cell != Cell::kRnn && layer.gates)
    zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, lane, Plan::kWarps);
  if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, lane, Plan::kWarps);
}

}  // namespace rnnfast::cuda
