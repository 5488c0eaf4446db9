// Tier group, forward: the recurrence of 8 sequences and one direction in a group of CTAs that all run at once.
//
// Shapes      H <= kHidden and P <= kProjection, the padded sizes; missing units are zeros. Grid: x = members of a
//             group, 16 units (RNN 32) each; y = groups, group = tile * D + direction, from first_group on.
// Ownership   A CTA has its units' rows of W_hh, all gates, as the a operand of mma in registers (what exceeds 128 per
//             lane, in shared memory) for the whole sequence. Each warp has a slice of the depth, kHidden / kWarps. A
//             thread owns a cell (unit and sequence; two where the CTA has more cells than threads): its h and c stay
//             in its registers (float).
// Projection  h has P units; the first P / 16 members own 16 of them each, as they own units, with these rows of W_hr.
//             The others receive nothing but h: they multiply zeros meanwhile, and nobody waits for that.
// One step    wait for this warp's slice of h | partial sums = W_hh h (mma) | to shared memory | barrier | cells: sum
//             over warps in their order, gates_x, cell | h to the exchange | results to memory.
//             With a projection o tanh(c) goes to the exchange instead of h, and then the same once more: wait for
//             this warp's slice of it | partial sums with W_hr | barrier | h: sum over warps | to exchange and memory.
//             The next step's gates_x are loaded before the wait for h.
// Exchange    See exchange.cuh. Slot s is the h that step s multiplies: hx in slot 0, the last step sends no h. With a
//             projection the o tanh(c) of step s lies behind it. Only members of a group wait for each other.
// One barrier Partial sums have two halves. A warp that stores to a half again has passed the barrier of the step in
//             between, which the readers of that half reached after they had read it. With a projection W_hh's sums are
//             one half and W_hr's the other: the other one's barrier lies in between.
// Saved       As in tier_cta_fwd.cuh: activated gates (LSTM: may replace gates_x in place: the thread that writes a
//             value is the only one that reads it, and earlier) and c; inference neither.
#pragma once

#include "cuda/device/batch_tile.cuh"
#include "cuda/device/exchange.cuh"
#include "cuda/device/weights.cuh"
#include "cuda/tiers/group/group.h"

namespace rnnfast::cuda {

// Units of a CTA. RNN's single gate leaves registers for two tiles, which halves the CTAs that read each h.
constexpr int group_units(Cell cell) { return cell == Cell::kRnn ? 2 * kTileRows : kTileRows; }

// kProjection: the padded P; 0 where there is no projection.
template <Arithmetic arithmetic, Cell cell, int kHidden, int kProjection, int kWarps>
struct GroupForward {
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ForwardMath<Element>>;
  static constexpr bool kProjected = kProjection > 0;
  static constexpr int kGates = gate_count(cell);
  static constexpr int kLargestHidden = kHidden;
  static constexpr int kLargestOutput = kProjected ? kProjection : kHidden;
  static constexpr int kUnits = group_units(cell);
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kTiles = kGates * (kUnits / kTileRows);
  // Of a warp: of h, which W_hh multiplies, and of o tanh(c), which W_hr multiplies.
  static constexpr int kDepth = kLargestOutput / kWarps, kProjectionDepth = kHidden / kWarps;
  static_assert(!kProjected || (cell == Cell::kLstm && kProjection <= kHidden));

  using Slots = Exchange<arithmetic, 1, kLargestOutput, kWarps>;
  using Unprojected = Exchange<arithmetic, 1, kHidden, kWarps>;
  static constexpr int kStepBytes = Slots::kSlotBytes + (kProjected ? Unprojected::kSlotBytes : 0);
  // Exact products need more registers beside the weights, for more sums and the low parts of h. A projection needs
  // some, and more where weights of both kinds exceed the budget and come from shared memory.
  static constexpr int kWords = (kTiles * kDepth + kProjectionDepth) * int(sizeof(Element)) / kChunkBytes * 8;
  static constexpr int kProjectionReserve = !kProjected ? 0 : kWords > kWeightBudget ? 32 : 16;
  static constexpr int kReserve = ArithmeticTraits<arithmetic>::kParts == 1 ? kProjectionReserve
                                  : kGates == 4                             ? 48
                                                                            : 32;
  static constexpr int kBudget = kWeightBudget - kReserve;
  using Recurrent = WeightTiles<arithmetic, kTiles, kDepth, kWarps, kBudget>;
  using Projection = WeightTiles<arithmetic, 1, kProjectionDepth, kWarps, max_of(kBudget - Recurrent::kWords, 0)>;
  using Sums = PartialSums<kTiles, kWarps>;
  using ProjectionSums = PartialSums<1, kWarps>;
  using Cells = CellPlaces<kUnits, kThreads>;
  using Stage = RowStage<arithmetic, kDepth>;

  // Shared memory: weights that are kept there, then (in turn) the stages of weights, or partial sums.
  static constexpr int kProjectionWeights = Recurrent::kSharedBytes;
  static constexpr int kSums = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kProjectionSums = kSums + Sums::kHalfBytes;  // in place of the second half
  static constexpr int kSumsBytes = Sums::kHalfBytes + (kProjected ? ProjectionSums::kHalfBytes : Sums::kHalfBytes);
  static constexpr int kStages = kWarps * Stage::kBytes;
  static constexpr int kSharedBytes = kSums + max_of(kSumsBytes, kStages);
};

template <Arithmetic arithmetic, Cell cell, int kHidden, int kProjection, int kWarps>
__global__ void __launch_bounds__(GroupForward<arithmetic, cell, kHidden, kProjection, kWarps>::kThreads, 1)
    group_forward(const __grid_constant__ ForwardLayer<ElementOf<arithmetic>> layer, unsigned char* exchange,
                  int first_group) {
  using Plan = GroupForward<arithmetic, cell, kHidden, kProjection, kWarps>;
  using Element = typename Plan::Element;
  using Cells = typename Plan::Cells;
  using Slots = typename Plan::Slots;
  using Unprojected = typename Plan::Unprojected;
  constexpr bool kProjected = Plan::kProjected;
  constexpr int kGates = Plan::kGates, kOwn = Cells::kOwn;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int group = first_group + int(blockIdx.y), direction = group % layer.directions, H = layer.hidden_size;
  const int P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, group / layer.directions, direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const int first_unit = int(blockIdx.x) * Plan::kUnits;
  const bool has_outputs = !kProjected || first_unit < P;  // whether this member has units of h
  const int covered = round_up(P, Plan::kUnits);           // units of h that some member sends
  // Units whose o tanh(c) this member waits for.
  const int covered_unprojected = has_outputs ? round_up(H, Plan::kUnits) : 0;
  unsigned char* const slots = exchange + int64_t(group) * layer.steps * Plan::kStepBytes;

  typename Plan::Recurrent recurrent;
  typename Plan::Projection projection;
  recurrent.use_shared(shared, lane);
  using Stage = typename Plan::Stage;
  unsigned char* const stage = shared + Plan::kSums + lane.warp * Stage::kBytes;
  const auto read = [&](int chunk, uint4& first, uint4& second) { Stage::read(stage, lane, chunk, first, second); };
  constexpr int kChunks = Plan::Recurrent::kChunks;  // of a stage
#pragma unroll
  for (int i = 0; i < Plan::kTiles; ++i) {
    const int row = first_unit + i / kGates * kTileRows, k = lane.warp * Plan::kDepth;
    Stage::fill(stage, weights.weight_hh + (int64_t(i % kGates) * H + row) * P + k, P, H - row, P - k);
    recurrent.load(i, 0, kChunks, read);
  }
  if constexpr (kProjected) {
    projection.use_shared(shared + Plan::kProjectionWeights, lane);
#pragma unroll
    for (int chunk = 0; chunk < Plan::Projection::kChunks; chunk += kChunks) {
      const int k = lane.warp * Plan::kProjectionDepth + chunk / kChunks * Plan::kDepth;
      Stage::fill(stage, weights.weight_hr + int64_t(first_unit) * H + k, H, P - first_unit, H - k);
      projection.load(0, chunk, kChunks, read);
    }
  }
  block_sync();

  int unit[kOwn], column[kOwn], length[kOwn];
  const auto is_output = [P](int u) { return !kProjected || u < P; };  // whether h has this unit
  float h[kOwn], c[kOwn], bias_hn[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i)) continue;
    unit[i] = first_unit + Cells::unit(i), column[i] = Cells::column(i);
    length[i] = unit[i] < H ? tile.length(column[i]) : 0;  // units of the padding never compute
    const bool known = unit[i] < H && tile.first + column[i] < tile.batch;
    const int64_t b = int64_t(direction) * tile.batch + tile.first + column[i];
    const int64_t at_h = b * P + unit[i], at_c = b * H + unit[i];
    h[i] = known && is_output(unit[i]) && layer.hx ? to_float(layer.hx[at_h]) : 0.f;
    c[i] = known && layer.cx ? to_float(layer.cx[at_c]) : 0.f;
    bias_hn[i] = unit[i] < H && weights.bias_hn ? to_float(weights.bias_hn[unit[i]]) : 0.f;
    if (has_outputs && tile.steps > 0) Slots::template store<Cells::kNeighbour>(slots, column[i], 0, unit[i], h[i]);
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
    typename Slots::Reader state(slots + int64_t(step) * Plan::kStepBytes, lane, covered);
    Element x[kOwn][kGates];
#pragma unroll
    for (int i = 0; i < kOwn * kGates; ++i) x[i / kGates][i % kGates] = coming[i / kGates][i % kGates];
    fetch(step + 1);
    unsigned char* const half = shared + Plan::kSums + (kProjected ? 0 : step % 2 * Plan::Sums::kHalfBytes);
    {
      float sum[Plan::kTiles][4];
      recurrent.multiply(sum, state);
      Plan::Sums::store(half, lane, sum);
    }
    block_sync();

    const int t = tile.time(step);
    const int64_t row = tile.row(t);
    unsigned char* const unprojected_slot = slots + int64_t(step) * Plan::kStepBytes + Slots::kSlotBytes;
    const auto output = [&](int i) -> Element& {
      return layer.output[((row + column[i]) * layer.directions + direction) * P + unit[i]];
    };
    const auto send_h = [&](int i) {
      if (step + 1 < tile.steps)
        Slots::template store<Cells::kNeighbour>(slots + int64_t(step + 1) * Plan::kStepBytes, column[i], 0, unit[i],
                                                 h[i]);
    };
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
      c[i] = active ? next_c : c[i];
      if constexpr (kProjected) {  // next_h is o tanh(c)
        Unprojected::template store<Cells::kNeighbour>(unprojected_slot, column[i], 0, unit[i], active ? next_h : 0.f);
      } else {
        h[i] = active ? next_h : h[i];
        send_h(i);
      }
      if (!active) continue;
      if constexpr (!kProjected) output(i) = from_float<Element>(h[i]);
      if (cell == Cell::kRnn || layer.gates == nullptr) continue;
      const int64_t saved_row = first_row + row + column[i];
#pragma unroll
      for (int m = 0; m < 4; ++m) layer.gates[(saved_row * 4 + m) * H + unit[i]] = from_float<Element>(g[m]);
      if constexpr (cell == Cell::kLstm) layer.c[saved_row * H + unit[i]] = c[i];
    }

    if constexpr (kProjected) {
      typename Unprojected::Reader unprojected(unprojected_slot, lane, covered_unprojected);
      float sum[1][4];
      projection.multiply(sum, unprojected);
      Plan::ProjectionSums::store(shared + Plan::kProjectionSums, lane, sum);
      block_sync();
      if (!has_outputs) continue;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (!Cells::exists(i)) continue;
        const float next = Plan::ProjectionSums::load(shared + Plan::kProjectionSums, Cells::block(i), Cells::place(i));
        const bool active = t < length[i] && is_output(unit[i]);
        h[i] = active ? next : h[i];
        send_h(i);
        if (active) output(i) = from_float<Element>(h[i]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i) || unit[i] >= H || tile.first + column[i] >= tile.batch) continue;
    const int64_t b = int64_t(direction) * tile.batch + tile.first + column[i];
    const int64_t at_h = b * P + unit[i], at_c = b * H + unit[i];
    if (is_output(unit[i])) layer.h_n[at_h] = from_float<Element>(h[i]);
    if constexpr (cell == Cell::kLstm) layer.c_n[at_c] = from_float<Element>(c[i]);
  }
  Lane of_group = lane;  // the members share the rows that no sequence has
  of_group.warp += int(blockIdx.x) * kWarps;
  const int warps = int(gridDim.x) * kWarps;
  zero_tails(tile, layer.output + int64_t(direction) * P, layer.directions * P, P, of_group, warps);
  if (cell != Cell::kRnn && layer.gates)
    zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, of_group, warps);
  if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, of_group, warps);
}

}  // namespace rnnfast::cuda
