// Tier group, forward: the recurrence of 8 sequences and one direction in a group of CTAs that all run at once.
//
// Shapes      H <= kHidden and P <= kProjection, the padded sizes; missing units are zeros.
//             Grid: x = members of a group, 16 units (RNN 32) each; y = groups, from first_group on.
//             group = tile * D + direction.
// Ownership   A CTA has its units' rows of W_hh, all gates, as the A operand of mma for the whole sequence. 128
//             registers per lane hold them; the rest lies in shared memory. A warp has a slice of the depth,
//             kHidden / kWarps. A thread owns a cell, two where the CTA has more cells than threads. h and c of its
//             cells stay in its registers (float).
// One step    wait for this warp's slice of h | partial sums = W_hh h (mma) | to shared memory | barrier | cells: sum
//             over warps in their order, gates_x, cell | h to the exchange | results to memory.
//             The next step's gates_x are loaded before the wait for h.
// Projection  h has P units. The first P / 16 members own 16 of them each, with these rows of W_hr. The other members
//             receive nothing but h: they multiply zeros, and nobody waits for that.
//             o tanh(c) goes to the exchange instead of h. Then the same once more: wait for this warp's slice of it |
//             partial sums with W_hr | barrier | h: sum over warps | to exchange and memory.
// Sync        Members wait for each other only in the exchange (exchange.cuh). Slot s is the h that step s multiplies:
//             hx in slot 0; the last step sends no h. Projected, the o tanh(c) of step s lies behind that h.
//             One barrier per step, because partial sums have two halves (projected: W_hh's and W_hr's). A warp writes
//             a half again after the barrier of the other half, which the readers reach after their reads.
// Saved       Training stores the activated gates and c; inference stores nothing. An LSTM may store its gates over
//             gates_x: only the thread that writes a value reads it, and earlier.
#pragma once

#include "cuda/device/batch_tile.cuh"
#include "cuda/device/exchange.cuh"
#include "cuda/device/weights.cuh"
#include "cuda/tiers/group/group.h"

namespace rnnfast::cuda {

// Units of a CTA. RNN has one gate, so registers hold two tiles. This halves the CTAs that read each h.
constexpr int group_units(Cell cell) { return cell == Cell::kRnn ? 2 * kTileRows : kTileRows; }

// The kernel's sizes and types, and its phases. kProjection: the padded P; 0 where there is no projection.
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
  // Registers that the weights leave. Exact products need them for more sums and the low parts of h. A projection needs
  // some, and more where both kinds of weights exceed the budget and come from shared memory.
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
  using Layer = ForwardLayer<Element>;
  static constexpr int kOwn = Cells::kOwn;  // cells of a thread

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
    constexpr int kChunks = Recurrent::kChunks;  // of a stage
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int row = first_unit + i / kGates * kTileRows, k = lane.warp * kDepth;
      Stage::fill(stage, weights.weight_hh + (int64_t(i % kGates) * H + row) * P + k, P, H - row, P - k);
      recurrent.load(i, 0, kChunks, read);
    }
    if constexpr (kProjected) {
      projection.use_shared(shared + kProjectionWeights, lane);
#pragma unroll
      for (int chunk = 0; chunk < Projection::kChunks; chunk += kChunks) {
        const int k = lane.warp * kProjectionDepth + chunk / kChunks * kDepth;
        Stage::fill(stage, weights.weight_hr + int64_t(first_unit) * H + k, H, P - first_unit, H - k);
        projection.load(0, chunk, kChunks, read);
      }
    }
  }

  // The state of a cell before its first step.
  static RNNFAST_DEVICE void init_cell(float& h, float& c, float& bias_hn, const Layer& layer,
                                       const Weights<Element>& weights, const BatchTile& tile, int direction, int unit,
                                       int column, int H, int P) {
    const bool known = unit < H && tile.first + column < tile.batch;
    const int64_t b = int64_t(direction) * tile.batch + tile.first + column;
    const int64_t at_h = b * P + unit, at_c = b * H + unit;
    h = known && is_output(unit, P) && layer.hx ? to_float(layer.hx[at_h]) : 0.f;
    c = known && layer.cx ? to_float(layer.cx[at_c]) : 0.f;
    bias_hn = unit < H && weights.bias_hn ? to_float(weights.bias_hn[unit]) : 0.f;
  }

  // g[m]: the activated gate m; GRU's gate 3 is W_hn h + b_hn. next_h: projected, o tanh(c).
  static RNNFAST_DEVICE void apply_cell(int i, float (&g)[4], float& next_h, float& c, float h,
                                        const Element (&x)[kGates], float bias_hn, const unsigned char* half, bool relu,
                                        bool active) {
    float next_c = c, from_h[kGates];
#pragma unroll
    for (int m = 0; m < kGates; ++m) {
      from_h[m] = Sums::load(half, Cells::block(i) * kGates + m, Cells::place(i));
      g[m] = to_float(x[m]);
      if (cell != Cell::kGru || m < 2) g[m] += from_h[m];
    }
    if constexpr (cell == Cell::kRnn) {
      next_h = Maths::rnn_forward(g[0], relu);
    } else if constexpr (cell == Cell::kGru) {
      g[3] = from_h[2] + bias_hn;
      next_h = Maths::gru_forward(g[0], g[1], g[2], g[3], h);
    } else {
      next_h = Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
    }
    c = active ? next_c : c;
  }

  static RNNFAST_DEVICE void store_saved(const Layer& layer, const float (&g)[4], float c, int64_t row, int unit,
                                         int H) {
#pragma unroll
    for (int m = 0; m < 4; ++m) layer.gates[(row * 4 + m) * H + unit] = from_float<Element>(g[m]);
    if constexpr (cell == Cell::kLstm) layer.c[row * H + unit] = c;
  }

  static RNNFAST_DEVICE void store_final(const Layer& layer, const float (&h)[kOwn], const float (&c)[kOwn],
                                         const int (&unit)[kOwn], const int (&column)[kOwn], const BatchTile& tile,
                                         const Lane& lane, int direction, int64_t first_row, int H, int P) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i) || unit[i] >= H || tile.first + column[i] >= tile.batch) continue;
      const int64_t b = int64_t(direction) * tile.batch + tile.first + column[i];
      const int64_t at_h = b * P + unit[i], at_c = b * H + unit[i];
      if (is_output(unit[i], P)) layer.h_n[at_h] = from_float<Element>(h[i]);
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
};

template <Arithmetic arithmetic, Cell cell, int kHidden, int kProjection, int kWarps>
__global__ void __launch_bounds__(GroupForward<arithmetic, cell, kHidden, kProjection, kWarps>::kThreads, 1)
    group_forward(const __grid_constant__ ForwardLayer<ElementOf<arithmetic>> layer, unsigned char* exchange,
                  int first_group) {
  using Traits = GroupForward<arithmetic, cell, kHidden, kProjection, kWarps>;
  using Element = typename Traits::Element;
  using Cells = typename Traits::Cells;
  using Slots = typename Traits::Slots;
  using Unprojected = typename Traits::Unprojected;
  constexpr bool kProjected = Traits::kProjected;
  constexpr int kGates = Traits::kGates, kOwn = Traits::kOwn;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int group = first_group + int(blockIdx.y), direction = group % layer.directions, H = layer.hidden_size;
  const int P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, group / layer.directions, direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const int first_unit = int(blockIdx.x) * Traits::kUnits;
  const bool has_outputs = !kProjected || first_unit < P;  // whether this member has units of h
  const int covered = round_up(P, Traits::kUnits);         // units of h that some member sends
  // Units whose o tanh(c) this member waits for.
  const int covered_unprojected = has_outputs ? round_up(H, Traits::kUnits) : 0;
  unsigned char* const slots = exchange + int64_t(group) * layer.steps * Traits::kStepBytes;

  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  Traits::load_weights(recurrent, projection, weights, shared, lane, first_unit, H, P);
  block_sync();

  int unit[kOwn], column[kOwn], length[kOwn];
  float h[kOwn], c[kOwn], bias_hn[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!Cells::exists(i)) continue;
    unit[i] = first_unit + Cells::unit(i), column[i] = Cells::column(i);
    length[i] = unit[i] < H ? tile.length(column[i]) : 0;  // units of the padding never compute
    Traits::init_cell(h[i], c[i], bias_hn[i], layer, weights, tile, direction, unit[i], column[i], H, P);
    if (has_outputs && tile.steps > 0) Slots::template store<Cells::kNeighbour>(slots, column[i], 0, unit[i], h[i]);
  }

  // The coming step's gates_x, as in memory: a conversion would wait for the load.
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
    typename Slots::Reader state(slots + int64_t(step) * Traits::kStepBytes, lane, covered);
    Element x[kOwn][kGates];
#pragma unroll
    for (int i = 0; i < kOwn * kGates; ++i) x[i / kGates][i % kGates] = coming[i / kGates][i % kGates];
    fetch(step + 1);
    unsigned char* const half = shared + Traits::kSums + (kProjected ? 0 : step % 2 * Traits::Sums::kHalfBytes);
    {
      float sum[Traits::kTiles][4];
      recurrent.multiply(sum, state);
      Traits::Sums::store(half, lane, sum);
    }
    block_sync();

    const int t = tile.time(step);
    const int64_t row = tile.row(t);
    unsigned char* const unprojected_slot = slots + int64_t(step) * Traits::kStepBytes + Slots::kSlotBytes;
    const auto output = [&](int i) -> Element& {
      return layer.output[((row + column[i]) * layer.directions + direction) * P + unit[i]];
    };
    const auto send_h = [&](int i) {
      if (step + 1 < tile.steps)
        Slots::template store<Cells::kNeighbour>(slots + int64_t(step + 1) * Traits::kStepBytes, column[i], 0, unit[i],
                                                 h[i]);
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!Cells::exists(i)) continue;
      const bool active = t < length[i];
      float g[4], next_h;
      Traits::apply_cell(i, g, next_h, c[i], h[i], x[i], bias_hn[i], half, layer.relu, active);
      if constexpr (kProjected) {  // next_h is o tanh(c)
        Unprojected::template store<Cells::kNeighbour>(unprojected_slot, column[i], 0, unit[i], active ? next_h : 0.f);
      } else {
        h[i] = active ? next_h : h[i];
        send_h(i);
      }
      if (!active) continue;
      if constexpr (!kProjected) output(i) = from_float<Element>(h[i]);
      if (cell == Cell::kRnn || layer.gates == nullptr) continue;
      Traits::store_saved(layer, g, c[i], first_row + row + column[i], unit[i], H);
    }

    if constexpr (kProjected) {
      typename Unprojected::Reader unprojected(unprojected_slot, lane, covered_unprojected);
      float sum[1][4];
      projection.multiply(sum, unprojected);
      Traits::ProjectionSums::store(shared + Traits::kProjectionSums, lane, sum);
      block_sync();
      if (!has_outputs) continue;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (!Cells::exists(i)) continue;
        const float next =
            Traits::ProjectionSums::load(shared + Traits::kProjectionSums, Cells::block(i), Cells::place(i));
        const bool active = t < length[i] && Traits::is_output(unit[i], P);
        h[i] = active ? next : h[i];
        send_h(i);
        if (active) output(i) = from_float<Element>(h[i]);
      }
    }
  }

  Traits::store_final(layer, h, c, unit, column, tile, lane, direction, first_row, H, P);
}

}  // namespace rnnfast::cuda
