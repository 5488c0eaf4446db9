// Tier group, forward: the recurrence of 8 sequences and one direction in a group of CTAs that all run at once.
//
// Shapes      H <= kHidden, the padded size; missing units are zeros. Grid: x = members of a group, 16 units (RNN 32)
//             each; y = groups, group = tile * D + direction, from first_group on.
// Ownership   A CTA has its units' rows of W_hh, all gates, as the a operand of mma in registers (what exceeds 128 per
//             lane, in shared memory) for the whole sequence. Each warp has a slice of the depth, kHidden / kWarps. A
//             thread owns a cell (unit and sequence; two where the CTA has more cells than threads): its h and c stay
//             in its registers (float).
// One step    wait for this warp's slice of h | partial sums = W_hh h (mma) | to shared memory | barrier | cells: sum
//             over warps in their order, gates_x, cell | h to the exchange | results to memory.
//             The next step's gates_x are loaded before the wait.
// Exchange    See exchange.cuh. Slot s is the h that step s multiplies: hx in slot 0, the last step sends nothing. Only
//             members of a group wait for each other.
// One barrier Partial sums have two halves. A warp that stores to a half again has passed the barrier of the step in
//             between, which the readers of that half reached after they had read it.
// Saved       As in tier_cta_fwd.cuh: activated gates (LSTM: may replace gates_x in place: the thread that writes a
//             value is the only one that reads it, and earlier) and c; inference neither.
#pragma once

#include "batch_tile.cuh"
#include "exchange.cuh"
#include "tier_group.h"
#include "weights.cuh"

namespace rnnfast::cuda {

// Units of a CTA. RNN's single gate leaves registers for two tiles, which halves the CTAs that read each h.
constexpr int group_units(Cell cell) { return cell == Cell::kRnn ? 2 * kTileRows : kTileRows; }

template <Product product, Cell cell, int kHidden, int kWarps>
struct GroupForward {
  using Element = ElementOf<product>;
  using Maths = CellMath<ForwardMath<Element>>;
  static constexpr int kGates = gate_count(cell);
  static constexpr int kLargestHidden = kHidden;
  static constexpr int kUnits = group_units(cell);
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kTiles = kGates * (kUnits / kTileRows);
  static constexpr int kDepth = kHidden / kWarps;  // of a warp

  using Slots = Exchange<product, 1, kHidden, kWarps>;
  // Exact products need more registers beside the weights, for more sums and the low parts of h.
  static constexpr int kBudget = kWeightBudget - (Arithmetic<product>::kParts == 1 ? 0 : kGates == 4 ? 48 : 32);
  using Recurrent = WeightTiles<product, kTiles, kDepth, kWarps, kBudget>;
  using Sums = PartialSums<kTiles, kWarps>;
  using Cells = CellPlaces<kUnits, kThreads>;
  using Stage = RowStage<product, kDepth>;

  // Shared memory: weights that are kept there, then (in turn) the stages of weights, or partial sums.
  static constexpr int kSums = Recurrent::kSharedBytes;
  static constexpr int kStages = kWarps * Stage::kBytes;
  static constexpr int kSharedBytes = kSums + max_of(Sums::kBytes, kStages);
};

template <Product product, Cell cell, int kHidden, int kWarps>
__global__ void __launch_bounds__(GroupForward<product, cell, kHidden, kWarps>::kThreads, 1)
    group_forward(const __grid_constant__ ForwardLayer<ElementOf<product>> layer, unsigned char* exchange,
                  int first_group) {
  using Plan = GroupForward<product, cell, kHidden, kWarps>;
  using Element = typename Plan::Element;
  using Cells = typename Plan::Cells;
  using Slots = typename Plan::Slots;
  constexpr int kGates = Plan::kGates, kOwn = Cells::kOwn;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int group = first_group + int(blockIdx.y), direction = group % layer.directions, H = layer.hidden_size;
  const BatchTile tile(layer, group / layer.directions, direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const int first_unit = int(blockIdx.x) * Plan::kUnits;
  const int covered = round_up(H, Plan::kUnits);  // units that some member sends
  unsigned char* const slots = exchange + int64_t(group) * layer.steps * Slots::kSlotBytes;

  typename Plan::Recurrent recurrent;
  recurrent.place(shared, lane);
#pragma unroll
  for (int i = 0; i < Plan::kTiles; ++i) {
    using Stage = typename Plan::Stage;
    unsigned char* const stage = shared + Plan::kSums + lane.warp * Stage::kBytes;
    const int row = first_unit + i / kGates * kTileRows, k = lane.warp * Plan::kDepth;
    Stage::fill(stage, weights.weight_hh + (int64_t(i % kGates) * H + row) * H + k, H, H - row, H - k);
    recurrent.load(i, 0, Plan::Recurrent::kChunks,
                   [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); });
  }
  block_sync();

  int unit[kOwn], column[kOwn], length[kOwn];
  float h[kOwn], c[kOwn], bias_hn[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i)) continue;
    unit[i] = first_unit + Cells::unit(i), column[i] = Cells::column(i);
    length[i] = unit[i] < H ? tile.length(column[i]) : 0;  // units of the padding never compute
    const bool known = unit[i] < H && tile.first + column[i] < tile.batch;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + column[i]) * H + unit[i];
    h[i] = known && layer.hx ? to_float(layer.hx[at]) : 0.f;
    c[i] = known && layer.cx ? to_float(layer.cx[at]) : 0.f;
    bias_hn[i] = unit[i] < H && weights.bias_hn ? to_float(weights.bias_hn[unit[i]]) : 0.f;
    if (tile.steps > 0) Slots::template store<Cells::kNeighbour>(slots, column[i], 0, unit[i], h[i]);
  }

  // A step's gates_x, as they are in memory: a conversion would wait for the load.
  Element coming[kOwn][kGates];
  const auto fetch = [&](int step) {
    if (step >= tile.steps) return;
    const int t = tile.time(step);
    const int64_t row = first_row + tile.row(t);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i) || t >= length[i]) continue;
      const Element* from = layer.gates_x + (row + column[i]) * kGates * H + unit[i];
#pragma unroll
      for (int m = 0; m < kGates; ++m) coming[i][m] = from[int64_t(m) * H];
    }
  };
  fetch(0);

  for (int step = 0; step < tile.steps; ++step) {
    typename Slots::Reader state(slots + int64_t(step) * Slots::kSlotBytes, lane, covered);
    Element x[kOwn][kGates];
#pragma unroll
    for (int i = 0; i < kOwn * kGates; ++i) x[i / kGates][i % kGates] = coming[i / kGates][i % kGates];
    fetch(step + 1);
    unsigned char* const half = shared + Plan::kSums + step % 2 * Plan::Sums::kHalfBytes;
    {
      float sum[Plan::kTiles][4];
      recurrent.multiply(sum, state);
      Plan::Sums::store(half, lane, sum);
    }
    block_sync();

    const int t = tile.time(step);
    const int64_t row = tile.row(t);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const bool active = t < length[i];
      float g[4], next_c = c[i], next_h, from_h[kGates];  // g[m]: gate m; GRU's g[3] is W_hn h + b_hn
#pragma unroll
      for (int m = 0; m < kGates; ++m) {
        from_h[m] = Plan::Sums::load(half, Cells::block(i) * kGates + m, Cells::place(i));
        g[m] = to_float(x[i][m]);
        if (cell != Cell::kGru || m < 2) g[m] += from_h[m];
      }
      if constexpr (cell == Cell::kRnn) {
        next_h = Plan::Maths::rnn_forward(g[0], layer.relu);
      } else if constexpr (cell == Cell::kGru) {
        g[3] = from_h[2] + bias_hn[i];
        next_h = Plan::Maths::gru_forward(g[0], g[1], g[2], g[3], h[i]);
      } else {
        next_h = Plan::Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
      }
      h[i] = active ? next_h : h[i];
      c[i] = active ? next_c : c[i];
      if (step + 1 < tile.steps)
        Slots::template store<Cells::kNeighbour>(slots + int64_t(step + 1) * Slots::kSlotBytes, column[i], 0, unit[i],
                                                 h[i]);
      if (!active) continue;
      layer.output[((row + column[i]) * layer.directions + direction) * H + unit[i]] = from_float<Element>(h[i]);
      if (cell == Cell::kRnn || layer.gates == nullptr) continue;
      const int64_t saved_row = first_row + row + column[i];
#pragma unroll
      for (int m = 0; m < 4; ++m) layer.gates[(saved_row * 4 + m) * H + unit[i]] = from_float<Element>(g[m]);
      if constexpr (cell == Cell::kLstm) layer.c[saved_row * H + unit[i]] = c[i];
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i) || unit[i] >= H || tile.first + column[i] >= tile.batch) continue;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + column[i]) * H + unit[i];
    layer.h_n[at] = from_float<Element>(h[i]);
    if constexpr (cell == Cell::kLstm) layer.c_n[at] = from_float<Element>(c[i]);
  }
  Lane of_group = lane;  // the members share the rows that no sequence has
  of_group.warp += int(blockIdx.x) * kWarps;
  const int warps = int(gridDim.x) * kWarps;
  zero_tails(tile, layer.output + int64_t(direction) * H, layer.directions * H, H, of_group, warps);
  if (cell != Cell::kRnn && layer.gates)
    zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, of_group, warps);
  if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, of_group, warps);
}

}  // namespace rnnfast::cuda
