// Tier CTA, forward: the whole recurrence of 8 sequences and one direction in one CTA. W_hh stays in its registers.
//
// Shapes      gates_x [D, N, G*H] -> output [N, D*P], h_n [D, B, P], c_n [D, B, H]; see layer.h.
//             Grid: x = batch tiles of 8, y = directions.
//             Padded units have zero weights and zero gates_x, so they stay 0.
// Ownership   A warp owns 16 units (32 where H > 128) with all their gates. A lane owns 2 units x 2 sequences of them.
//             W_hh is the A operand of mma, in registers for the whole sequence.
//             h and c are float, in registers of the lane that computes them. h also lies in shared memory,
//             double-buffered: it is the B operand.
// One step    sum = W_hh h (mma) | gates_x from the ring, cell, h to the other buffer | barrier.
//             During the product, cp.async fetches the gates_x of kStages - 1 steps ahead.
// Projection  o tanh(c) goes to shared memory. After a barrier, a warp multiplies its 16 rows of W_hr by it.
//             The result is h, which has P units.
// Sync        One barrier per step, two with a projection. A step writes a buffer of h and a stage of the ring that
//             the step before has read. The barrier between the two steps comes after those reads.
// Saved       Training stores the activated gates and c; inference stores nothing. An LSTM may store its gates over
//             gates_x: a row is read before it is written.
// Limits      H <= kHidden: 32, 64, 96, 128 (RNN to 256); float: 32, 64 (RNN 128). 128 of a lane's 255 registers hold
//             weights, and at most 8 warps of an SM have so many.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cta/cta.h"

namespace rnnfast::cuda {

// The kernel's sizes and types, and its phases.
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
  // Exact products of 4 gates have more sums: the weights leave 48 registers to them.
  static constexpr int kBudget = kWeightBudget - (ArithmeticTraits<arithmetic>::kParts == 2 && kGates == 4 ? 48 : 0);
  using Recurrent = WeightTiles<arithmetic, kGates * kBlocks, kHidden, kWarps, kBudget>;
  static constexpr int kProjectionBudget = max_of(kBudget - Recurrent::kWords, 0);  // what W_hh leaves
  using Projection = WeightTiles<arithmetic, 1, kHidden, kWarps, kProjectionBudget>;
  using Stage = RowStage<arithmetic, kHidden>;
  using Values = float[kBlocks][4];  // of a lane: [unit half][column] of each block, as an mma's sums
  using Layer = ForwardLayer<Element>;

  // Shared memory: the weights that stay there. Behind them, first the stages of weights, later operands and ring.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kStates = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kUnprojected = kStates + 2 * State::kBytes;
  static constexpr int kRing = kUnprojected + (kProjected ? State::kBytes : 0);
  static constexpr int kEnd = kRing + kStages * Gates::kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kStates + kWarps * Stage::kBytes);

  // What is computed before the loop and kept. The compiler, short of registers, made it again at every store.
  struct Targets {
    int outputs, saved;  // elements of a row: of output, of gates
    bool saves;
    Element *output, *gates;  // of the lane's first pair in row 0 of the tile
    float* c;
  };

  // The first of a lane's two units of a block.
  static RNNFAST_DEVICE int unit(const Lane& lane, int block) {
    return (lane.warp * kBlocks + block) * kTileRows + 2 * lane.group;
  }

  static RNNFAST_DEVICE void load_weights(Recurrent& recurrent, Projection& projection, const Weights<Element>& weights,
                                          unsigned char* shared, const Lane& lane, int H, int P) {
    unsigned char* const stage = shared + kStates + lane.warp * Stage::kBytes;
    const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
    recurrent.use_shared(shared, lane);
#pragma unroll
    for (int i = 0; i < kGates * kBlocks; ++i) {
      const int row = (lane.warp * kBlocks + i / kGates) * kTileRows;
      Stage::fill(stage, weights.weight_hh + (int64_t(i % kGates) * H + row) * P, H - row, P);
      recurrent.load(i, 0, Recurrent::kChunks, read);
    }
    if constexpr (kProjected) {
      const int row = lane.warp * kTileRows;
      projection.use_shared(shared + kProjectionWeights, lane);
      Stage::fill(stage, weights.weight_hr + int64_t(row) * H, P - row, H);
      projection.load(0, 0, Projection::kChunks, read);
    }
  }

  // Columns column and column + 1 are the lane's sequences.
  static RNNFAST_DEVICE void init_state(Values& h, Values& c, float2 (&bias_hn)[kBlocks], const Layer& layer,
                                        const Weights<Element>& weights, const BatchTile& tile, unsigned char* shared,
                                        const Lane& lane, int direction, int column, int H, int P) {
    const int sequence = tile.first + column;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int u = unit(lane, block);
      bias_hn[block] = weights.bias_hn ? load_pair(weights.bias_hn, u, H) : float2{0.f, 0.f};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t b = int64_t(direction) * tile.batch + sequence + j;
        const bool known = sequence + j < tile.batch;
        const float2 first_h = known && layer.hx ? load_pair(layer.hx + b * P, u, P) : float2{0.f, 0.f};
        const float2 first_c = known && layer.cx ? load_pair(layer.cx + b * H, u, H) : float2{0.f, 0.f};
        h[block][j] = first_h.x, h[block][2 + j] = first_h.y;
        c[block][j] = first_c.x, c[block][2 + j] = first_c.y;
        State::store_pair(shared + kStates, State::offset(column + j, u), first_h.x, first_h.y);
      }
    }
  }

  // gate[..][m]: the activated gate m; GRU's gate 3 is W_hn h + b_hn. value: the new h, projected o tanh(c).
  static RNNFAST_DEVICE void apply_cell(float (&gate)[kBlocks][4][4], Values& value, Values& c, const Values& h,
                                        const float (&sum)[kGates * kBlocks][4], const float2 (&bias_hn)[kBlocks],
                                        const unsigned char* stage, const bool (&active)[2], bool relu,
                                        const Lane& lane, int column) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 x[kGates];
#pragma unroll
        for (int m = 0; m < kGates; ++m) x[m] = Gates::read(stage, column + j, m, unit(lane, block));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * half + j;
          float (&g)[4] = gate[block][i];
#pragma unroll
          for (int m = 0; m < kGates; ++m) g[m] = half ? x[m].y : x[m].x;
#pragma unroll
          for (int m = 0; m < (cell == Cell::kGru ? 2 : kGates); ++m) g[m] += sum[block * kGates + m][i];
          if constexpr (cell == Cell::kRnn) {
            value[block][i] = Maths::rnn_forward(g[0], relu);
          } else if constexpr (cell == Cell::kGru) {
            g[3] = sum[block * kGates + 2][i] + (half ? bias_hn[block].y : bias_hn[block].x);
            value[block][i] = Maths::gru_forward(g[0], g[1], g[2], g[3], h[block][i]);
          } else {
            float next_c = c[block][i];
            value[block][i] = Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
            c[block][i] = active[j] ? next_c : c[block][i];
          }
        }
      }
  }

  // words: pairs are stored as words.
  static RNNFAST_DEVICE void store_step(const Targets& to, bool words, int64_t row, const Values& h, const Values& c,
                                        const float (&gate)[kBlocks][4][4], const bool (&active)[2], const Lane& lane,
                                        int H, int P) {
    Element* const to_output = to.output + row * to.outputs;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (active[j])
          store_pairs<1>(to_output + j * to.outputs + block * kTileRows, 0, P - unit(lane, block), words,
                         column_of(h[block], j));
    if (!to.saves) return;
    Element* const to_gates = to.gates + row * to.saved;
    float* const to_c = cell == Cell::kLstm ? to.c + row * H : nullptr;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (active[j] && unit(lane, block) < H) {
          store_pairs<4>(to_gates + j * to.saved + block * kTileRows, H, H - unit(lane, block), words,
                         [&](int m, int half) { return gate[block][2 * half + j][m]; });
          if constexpr (cell == Cell::kLstm)
            store_pairs<1>(to_c + j * H + block * kTileRows, 0, H - unit(lane, block), words, column_of(c[block], j));
        }
  }

  static RNNFAST_DEVICE void store_final(const Layer& layer, const Values& h, const Values& c, const BatchTile& tile,
                                         const Lane& lane, int direction, int column, int64_t first_row, int H, int P) {
    const int sequence = tile.first + column;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (sequence + j >= tile.batch) continue;
        const int64_t b = int64_t(direction) * tile.batch + sequence + j;
        const int u = unit(lane, block);
        store_pairs<1>(layer.h_n + b * P + u, 0, P - u, false, column_of(h[block], j));
        if constexpr (cell == Cell::kLstm)
          store_pairs<1>(layer.c_n + b * H + u, 0, H - u, false, column_of(c[block], j));
      }
    zero_tails(tile, layer.output + direction * P, layer.directions * P, P, lane, kWarps);
    if (cell != Cell::kRnn && layer.gates)
      zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, lane, kWarps);
    if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, lane, kWarps);
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(CtaForward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cta_forward(const __grid_constant__ ForwardLayer<ElementOf<arithmetic>> layer) {
  using Traits = CtaForward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Traits::Element;
  using State = typename Traits::State;
  constexpr int kGates = Traits::kGates, kBlocks = Traits::kBlocks, kStages = Traits::kStages;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = layer.output_size;
  const BatchTile tile(layer, int(blockIdx.x), direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]

  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  Traits::load_weights(recurrent, projection, weights, shared, lane, H, P);
  block_sync();
  zero_shared(shared + Traits::kStates, Traits::kEnd - Traits::kStates, Traits::kThreads);
  block_sync();

  const int column = 2 * lane.member;
  const int lengths[2] = {tile.length(column), tile.length(column + 1)};
  typename Traits::Values h, c;
  float2 bias_hn[kBlocks];
  Traits::init_state(h, c, bias_hn, layer, weights, tile, shared, lane, direction, column, H, P);

  const typename Traits::Gates stream(layer.gates_x + first_row * kGates * H, kGates * H, H);
  const int stream_length = tile.length(Traits::Gates::column());
  const auto stage_of = [&](int step) { return shared + Traits::kRing + step % kStages * Traits::Gates::kStageBytes; };
  const auto fetch = [&](int step, int64_t row) {
    if (step < tile.steps) stream.fetch(stage_of(step), row, tile.time(step) < stream_length);
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step, tile.row(tile.time(step)));
  copy_wait<kStages - 2>();
  block_sync();

  typename Traits::Targets to;
  to.outputs = layer.directions * P, to.saved = 4 * H;
  to.saves = cell != Cell::kRnn && layer.gates != nullptr;
  const int u = Traits::unit(lane, 0);
  to.output = layer.output + int64_t(column) * to.outputs + direction * P + u;
  to.gates = to.saves ? layer.gates + (first_row + column) * to.saved + u : nullptr;
  to.c = to.saves && cell == Cell::kLstm ? layer.c + (first_row + column) * H + u : nullptr;
  const bool aligned =
      keep(pairs_aligned(layer.output, P) && pairs_aligned(layer.gates, H) && pairs_aligned(layer.c, H));
  const int state_offset = State::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step);
    const bool active[2] = {t < lengths[0], t < lengths[1]};
    float sum[kGates * kBlocks][4];
    recurrent.multiply(sum, shared + Traits::kStates + step % 2 * State::kBytes, state_offset);
    // While the products are under way.
    const int64_t row = tile.row(t);
    fetch(step + kStages - 1, tile.row(tile.time(step + kStages - 1)));

    float gate[kBlocks][4][4];
    typename Traits::Values value;
    Traits::apply_cell(gate, value, c, h, sum, bias_hn, stage_of(step), active, layer.relu, lane, column);

    if constexpr (kProjected) {
#pragma unroll
      for (int j = 0; j < 2; ++j)
        State::store_pair(shared + Traits::kUnprojected, State::offset(column + j, u), value[0][j], value[0][2 + j]);
      block_sync();
      projection.multiply(value, shared + Traits::kUnprojected, state_offset);
    }

#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        h[block][j] = active[j] ? value[block][j] : h[block][j];
        h[block][2 + j] = active[j] ? value[block][2 + j] : h[block][2 + j];
        State::store_pair(shared + Traits::kStates + (step + 1) % 2 * State::kBytes,
                          State::offset(column + j, Traits::unit(lane, block)), h[block][j], h[block][2 + j]);
      }
    if (aligned)  // one branch for all stores of a step, not one for each
      Traits::store_step(to, true, row, h, c, gate, active, lane, H, P);
    else
      Traits::store_step(to, false, row, h, c, gate, active, lane, H, P);
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();
  }
  Traits::store_final(layer, h, c, tile, lane, direction, column, first_row, H, P);
}

}  // namespace rnnfast::cuda
