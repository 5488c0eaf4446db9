// Tier cluster, backward: the recurrence of 8 sequences and one direction in a cluster of CTAs, against the
// direction's time. sm_90 and newer.
//
// Shapes      As in tier_cluster_fwd.cuh: a CTA has a slice of kHidden / kCtas units.
// Ownership   A CTA computes the gate gradients of its units, and from them alone what they add to dh of all units: it
//             keeps the same rows of W_hh as in forward, here transposed, as the a operand of mma in registers (rows:
//             all units of h; depth: all gates of its own units). A warp has kTiles times 16 of those rows. A thread
//             owns pairs of neighbouring units of one sequence, with their dh, dc and c in registers (float).
// One step    the parts of dh have arrived (mbarrier), one from each CTA: dh is their sum, in the order of ranks |
//             gates, c or h', grad_output from the ring, cell, gate gradients to shared and global memory | barrier of
//             the CTA | parts of dh = W_hh^T dgates (mma), each pair of units by store_async to the CTA that owns it.
//             Parts are float: that is half the traffic of gathering 16-bit gate gradients of LSTM, a quarter of float.
// Projection  dh has P units, of which a CTA owns those with its units' numbers. From them it computes parts of the
//             gradient of o tanh(c) of all units, by its rows of W_hr in shared memory, for registers are full: the
//             same exchange once more, before the cell.
// Buffers     Two of parts and of gate gradients. An exchange overwrites the parts of the one before the last (with a
//             projection dh's parts always go to the first buffer). It is sent by who has all parts of the last one,
//             and every CTA has a barrier between its reads of those before and its part in the last one. Such a
//             barrier also lies between the reads of an operand and its next writes.
// Exit        A CTA ends after it has received the last parts, of grad_hx; nothing more is under way to it.
// Stored      grad_gates (planes as in csrc/common/cell.h) and, projected, dh: gradients of weights, biases and x are
//             products afterwards.
// c and h'    As in tier_cta_bwd.cuh: the ring brings them from the row that comes next.
// Limits      As in forward.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cluster/cluster.h"

namespace rnnfast::cuda {

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
struct ClusterBackward {
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ExactMath>;
  static constexpr int kCtas = cluster_tile(arithmetic, cell, kHidden, kProjected).ctas;
  static constexpr int kWarps = cluster_tile(arithmetic, cell, kHidden, kProjected).backward_warps;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kStages = ring_stages(arithmetic);
  static constexpr int kGates = gate_count(cell);  // planes that multiply W_hh
  static constexpr int kSavedPlanes = saved_planes(cell);
  static constexpr int kGradPlanes = grad_planes(cell);  // planes in memory
  static constexpr int kSlice = kHidden / kCtas;         // units of a CTA
  static constexpr int kTiles = kHidden / kTileRows / kWarps;
  static_assert(kHidden % (kTileRows * kWarps) == 0 && kSlice % 8 == 0 && (!kProjected || cell == Cell::kLstm));

  // Depth: plane after plane of kSlice.
  static constexpr int kChunk = kChunkBytes / int(sizeof(Element));
  static constexpr int kDepth = round_up(kGates * kSlice, kChunk);
  using GateGrads = Operand<arithmetic, kDepth>;
  // A projection takes 16 registers, for addresses and sums.
  using Recurrent = WeightTiles<arithmetic, kTiles, kDepth, kWarps, kWeightBudget - (kProjected ? 16 : 0)>;
  using Stage = ColumnStage<arithmetic, kDepth>;
  // W_hr: depth is the slice's outputs.
  static constexpr int kOutputDepth = round_up(kSlice, kChunk);
  using ProjectedGrads = Operand<arithmetic, kOutputDepth>;
  using Projection = WeightTiles<arithmetic, kTiles, kOutputDepth, kWarps, 0>;

  // Parts of dh: [rank][pair of units][column][2] float.
  static constexpr int kPairBytes = kColumns * int(sizeof(float2));
  static constexpr int kPartBytes = kSlice / 2 * kPairBytes;
  static constexpr int kPartsBytes = kCtas * kPartBytes;
  static constexpr int kItems = (kSlice / 2 * kColumns + kThreads - 1) / kThreads;  // pairs of a thread

  // What the cell's derivative needs: saved gates (not RNN), then LSTM c of the previous step, GRU h of the previous
  // step, RNN h of the step itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;
  using Gates = RowStream<Element, max_of(kSavedPlanes, 1), kSlice, kThreads>;
  using States = RowStream<State, 1, kSlice, kThreads>;
  using Outputs = RowStream<Element, 1, kSlice, kThreads>;

  static constexpr int kStatesAt = cell == Cell::kRnn ? 0 : Gates::kStageBytes;  // within a stage of the ring
  static constexpr int kOutputsAt = kStatesAt + States::kStageBytes;
  static constexpr int kStageBytes = kOutputsAt + Outputs::kStageBytes;

  // Shared memory: mbarriers, weights that are kept there, then (in turn) the stages of weights, or operands and ring.
  static constexpr int kBarriers = 0;
  static constexpr int kWeights = 128;
  static constexpr int kProjectionWeights = kWeights + Recurrent::kSharedBytes;
  static constexpr int kGateGrads = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kProjectedGrads = kGateGrads + 2 * GateGrads::kBytes;
  static constexpr int kParts = kProjectedGrads + (kProjected ? ProjectedGrads::kBytes : 0);
  static constexpr int kInitial = kParts + 2 * kPartsBytes;  // hx or cx as a stage
  static constexpr int kRing = kInitial + (cell == Cell::kRnn ? 0 : States::kStageBytes);
  static constexpr int kEnd = kRing + kStages * kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kGateGrads + kWarps * Stage::kBytes);

  // A warp's columns of a weight [planes * rows, columns], in rows `first` ... of each plane, as many as a slice has.
  template <int kPlanes, class Tiles>
  static RNNFAST_DEVICE void load_weights(Tiles& tiles, unsigned char* stage, const Element* weight, int rows,
                                          int columns, int first, Lane lane) {
    constexpr int kRun = Stage::kRun;
    const auto read = [&](int chunk, uint4& low, uint4& high) { Stage::read(stage, lane, chunk, low, high); };
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = (lane.warp * kTiles + tile) * kTileRows;
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        stage_rows<Stage::kMost>(
            stage, plane == 0 ? Stage::kBytes : 0, weight + (int64_t(plane) * rows + first) * columns + column, columns,
            column < columns ? min(kSlice, rows - first) : 0, min(kTileRows, columns - column), [&](int row) {
              const int k = plane * kSlice + row;
              return k / kRun * Stage::kRunBytes + k % kRun * Stage::kMost;
            });
      tiles.load(tile, 0, Tiles::kChunks, read);
    }
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(ClusterBackward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cluster_backward(const __grid_constant__ BackwardLayer<ElementOf<arithmetic>> layer) {
  using Plan = ClusterBackward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Plan::Element;
  using GateGrads = typename Plan::GateGrads;
  using ProjectedGrads = typename Plan::ProjectedGrads;
  constexpr int kSlice = Plan::kSlice, kCtas = Plan::kCtas, kItems = Plan::kItems, kStages = Plan::kStages;
  constexpr int kAllItems = kSlice / 2 * kColumns;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, int(blockIdx.x) / kCtas, direction);
  const int64_t first_row = int64_t(direction) * layer.rows;
  const int rank = int(cluster_rank()), first_unit = rank * kSlice;

  typename Plan::Recurrent recurrent;
  typename Plan::Projection projection;
  unsigned char* const weight_stage = shared + Plan::kGateGrads + lane.warp * Plan::Stage::kBytes;
  const Weights<Element>& weights = layer.weights[direction];
  recurrent.use_shared(shared + Plan::kWeights, lane);
  Plan::template load_weights<Plan::kGates>(recurrent, weight_stage, weights.weight_hh, H, P, first_unit, lane);
  if constexpr (kProjected) {
    projection.use_shared(shared + Plan::kProjectionWeights, lane);
    Plan::template load_weights<1>(projection, weight_stage, weights.weight_hr, P, H, first_unit, lane);
  }
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + Plan::kBarriers);  // of the two buffers of parts
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
    barrier_init_fence();
    for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, Plan::kPartsBytes);
  }
  block_sync();
  zero_shared(shared + Plan::kGateGrads, Plan::kEnd - Plan::kGateGrads, Plan::kThreads);
  block_sync();

  // Where the parts of this lane's rows of each tile go: 16 bytes for two units of two sequences.
  RemoteAddress owners[Plan::kTiles];
  int targets[Plan::kTiles];  // within a buffer of parts
#pragma unroll
  for (int i = 0; i < Plan::kTiles; ++i) {
    const int unit = (lane.warp * Plan::kTiles + i) * kTileRows + 2 * lane.group;
    owners[i] = map_to_rank(shared, unsigned(unit / kSlice));
    targets[i] = rank * Plan::kPartBytes + unit % kSlice / 2 * Plan::kPairBytes + 2 * lane.member * int(sizeof(float2));
  }

  // Item of a thread: units unit and unit + 1 (of the slice), one column. A warp has 8 units of all columns.
  const auto exists = [&](int item) { return kAllItems % Plan::kThreads == 0 || item < kAllItems; };
  const int column = int(threadIdx.x) % kColumns, length = tile.length(column);
  const bool known = tile.first + column < tile.batch;
  const int64_t b = int64_t(direction) * tile.batch + tile.first + column;
  const auto unit_of = [&](int i) { return (int(threadIdx.x) + i * Plan::kThreads) / kColumns * 2; };
  const auto item_exists = [&](int i) { return exists(int(threadIdx.x) + i * Plan::kThreads); };
  // dh: gradient of the step's output that comes from the step after it, or from h_n.
  float dh[kItems][2], dc[kItems][2], c[kItems][2];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float2 zero = {0.f, 0.f};
    const int u = first_unit + unit_of(i);
    const bool real = known && item_exists(i);
    const float2 last_dh = real && layer.grad_h_n ? load_pair(layer.grad_h_n + b * P, u, P) : zero;
    const float2 last_dc = real && layer.grad_c_n ? load_pair(layer.grad_c_n + b * H, u, H) : zero;
    dh[i][0] = last_dh.x, dh[i][1] = last_dh.y;
    dc[i][0] = last_dc.x, dc[i][1] = last_dc.y;
    if constexpr (cell != Cell::kRnn) {
      const Element* initial = cell == Cell::kLstm ? layer.cx : layer.hx;  // [D, B, H]
      if (item_exists(i))
        Plan::States::put(shared + Plan::kInitial, column, unit_of(i),
                          known && initial ? load_pair(initial + b * H, u, H) : zero);
    }
    float2 last_c = zero;
    const int t = tile.first_time(true);
    if (cell == Cell::kLstm && item_exists(i) && t < length)
      last_c = load_pair(layer.c + (first_row + tile.row(t) + column) * H, u, H);
    c[i][0] = last_c.x, c[i][1] = last_c.y;
  }

  const int outputs = layer.directions * P, width = max(min(kSlice, H - first_unit), 0);
  const int output_width = max(min(kSlice, P - first_unit), 0);
  const typename Plan::Gates gate_stream(layer.gates + first_row * Plan::kSavedPlanes * H + first_unit,
                                         Plan::kSavedPlanes * H, width, H);
  const typename Plan::States state_stream = [&] {
    if constexpr (cell == Cell::kLstm)
      return typename Plan::States(layer.c + first_row * H + first_unit, H, width);
    else
      return typename Plan::States(layer.output + direction * P + first_unit, outputs, width);
  }();
  const typename Plan::Outputs output_stream(layer.grad_output + direction * P + first_unit, outputs, output_width);
  const int gate_length = tile.length(Plan::Gates::column()), state_length = tile.length(Plan::States::column());
  const int output_length = tile.length(Plan::Outputs::column());
  const auto stage_of = [&](int step) { return shared + Plan::kRing + step % kStages * Plan::kStageBytes; };
  const auto row_of = [&](int step) { return tile.row(tile.time(step, true)); };
  const auto fetch = [&](int step) {
    if (step < tile.steps) {
      const int t = tile.time(step, true);
      const int64_t row = row_of(step);
      if constexpr (cell != Cell::kRnn) gate_stream.fetch(stage_of(step), row, t < gate_length);
      if (layer.grad_output) output_stream.fetch(stage_of(step) + Plan::kOutputsAt, row, t < output_length);
      unsigned char* states = stage_of(step) + Plan::kStatesAt;
      if constexpr (cell == Cell::kRnn)
        state_stream.fetch(states, row, t < state_length);
      else
        state_stream.fetch(states, row_of(step + 1), step + 1 < tile.steps && tile.time(step + 1, true) < state_length);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages; ++step) fetch(step);
  copy_wait<kStages - 1>();
  block_sync();
  cluster_arrive();
  cluster_wait();

  // Sends each CTA the parts of its units to a buffer there.
  const auto send = [&](const float (&sum)[Plan::kTiles][4], int buffer) {
#pragma unroll
    for (int i = 0; i < Plan::kTiles; ++i) {
      const uint4 part = {__float_as_uint(sum[i][0]), __float_as_uint(sum[i][2]), __float_as_uint(sum[i][1]),
                          __float_as_uint(sum[i][3])};
      store_async(owners[i] + (Plan::kParts + buffer * Plan::kPartsBytes + targets[i]), part,
                  owners[i] + (Plan::kBarriers + buffer * int(sizeof(Barrier))));
    }
  };
  // Calls take(i, sum of all CTAs' parts) for the items of a thread. `before`: how often the buffer was filled before.
  const auto receive = [&](int buffer, int before, auto take) {
    barrier_wait(barriers + buffer, before % 2);
    if (threadIdx.x == 0) barrier_arrive_expect(barriers + buffer, Plan::kPartsBytes);
    const unsigned char* parts = shared + Plan::kParts + buffer * Plan::kPartsBytes + column * int(sizeof(float2));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!item_exists(i)) continue;
      const unsigned char* part = parts + unit_of(i) / 2 * Plan::kPairBytes;
      float2 sum = *reinterpret_cast<const float2*>(part);
#pragma unroll
      for (int from = 1; from < kCtas; ++from) {
        const float2 next = *reinterpret_cast<const float2*>(part + from * Plan::kPartBytes);
        sum.x += next.x, sum.y += next.y;
      }
      take(i, sum);
    }
  };
  // Adds to dh what the step before this one has sent; a sequence that took no part in that keeps its dh.
  const auto receive_dh = [&](int step) {
    if (step == 0) return;
    const bool took_part = tile.time(step - 1, true) < length;
    receive(kProjected ? 0 : step % 2, kProjected ? step - 1 : (step - 1) / 2, [&](int i, float2 sum) {
      dh[i][0] += took_part ? sum.x : 0.f;
      dh[i][1] += took_part ? sum.y : 0.f;
    });
  };

  const bool grads_aligned = pairs_aligned(layer.grad_gates, H);
  const bool projected_aligned = kProjected && pairs_aligned(layer.grad_projected, P);
  const int grads_offset = GateGrads::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step, true), buffer = step % 2;
    const int64_t row = first_row + tile.row(t) + column;
    const unsigned char* stage = stage_of(step);
    const bool active = t < length;
    const bool has_previous = step + 1 < tile.steps && tile.time(step + 1, true) < length;
    const bool at_first = cell != Cell::kRnn && !has_previous;  // or not active
    const unsigned char* states = at_first ? shared + Plan::kInitial : stage + Plan::kStatesAt;
    unsigned char* const operand = shared + Plan::kGateGrads + buffer * GateGrads::kBytes;
    receive_dh(step);
    const auto grad_of_output = [&](int i) {
      const float2 from_output = Plan::Outputs::read(stage + Plan::kOutputsAt, column, 0, unit_of(i));
      return float2{dh[i][0] + from_output.x, dh[i][1] + from_output.y};
    };
    float2 hidden[kItems];  // projected: gradient of the cell's h, before the projection
    if constexpr (kProjected) {
      unsigned char* const projected = shared + Plan::kProjectedGrads;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!item_exists(i)) continue;
        const int u = unit_of(i);
        const float2 grad = grad_of_output(i);
        ProjectedGrads::store_pair(projected, ProjectedGrads::offset(column, u), grad.x, grad.y);
        if (active)
          store_pairs<1>(layer.grad_projected + row * P + first_unit + u, 0, P - first_unit - u, projected_aligned,
                         [&](int, int half) { return half ? grad.y : grad.x; });
      }
      block_sync();
      float sum[Plan::kTiles][4];
      projection.multiply(sum, projected, ProjectedGrads::lane_offset(lane));
      send(sum, 1);
      receive(1, step, [&](int i, float2 sum) { hidden[i] = sum; });
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!item_exists(i)) continue;
      const int u = unit_of(i);
      const float2 grads = kProjected ? hidden[i] : grad_of_output(i);
      const float2 state = Plan::States::read(states, column, 0, u);
      float2 gate[4];
      if constexpr (cell != Cell::kRnn) {
#pragma unroll
        for (int m = 0; m < 4; ++m) gate[m] = Plan::Gates::read(stage, column, m, u);
      }
      float grad[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float s = half ? state.y : state.x;
        const float grad_h = half ? grads.y : grads.x;
        float g[4], carry = 0.f;
#pragma unroll
        for (int m = 0; m < (cell == Cell::kRnn ? 0 : 4); ++m) g[m] = half ? gate[m].y : gate[m].x;
        if constexpr (cell == Cell::kRnn) {
          grad[half][0] = Plan::Maths::rnn_backward(grad_h, s, layer.relu);
        } else if constexpr (cell == Cell::kGru) {
          const auto d = Plan::Maths::gru_backward(grad_h, g[0], g[1], g[2], g[3], s);
          grad[half][0] = d.n_x, grad[half][1] = d.r, grad[half][2] = d.z, grad[half][3] = d.n_h;
          carry = d.carry;
        } else {
          const auto d = Plan::Maths::lstm_backward(grad_h, dc[i][half], g[0], g[1], g[2], g[3], c[i][half], s);
          grad[half][0] = d.i, grad[half][1] = d.f, grad[half][2] = d.g, grad[half][3] = d.o;
          dc[i][half] = active ? d.dc : dc[i][half];
          c[i][half] = has_previous ? s : c[i][half];
        }
        dh[i][half] = active ? carry : dh[i][half];
      }
      constexpr int kFirst = Plan::kGradPlanes - Plan::kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
      for (int m = 0; m < Plan::kGates; ++m)
        GateGrads::store_pair(operand, GateGrads::offset(column, m * kSlice + u), grad[0][kFirst + m],
                              grad[1][kFirst + m]);
      if (active)
        store_pairs<Plan::kGradPlanes>(layer.grad_gates + (row * Plan::kGradPlanes) * H + first_unit + u, H,
                                       H - first_unit - u, grads_aligned,
                                       [&](int m, int half) { return grad[half][m]; });
    }
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();

    float sum[Plan::kTiles][4];
    recurrent.multiply(sum, operand, grads_offset);
    send(sum, kProjected ? 0 : 1 - buffer);
    fetch(step + kStages);  // while the parts are under way
  }
  receive_dh(tile.steps);

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!known || !item_exists(i)) continue;
    const int u = first_unit + unit_of(i);
    store_pairs<1>(layer.grad_hx + b * P + u, 0, P - u, false, [&](int, int half) { return dh[i][half]; });
    if constexpr (cell == Cell::kLstm)
      store_pairs<1>(layer.grad_cx + b * H + u, 0, H - u, false, [&](int, int half) { return dc[i][half]; });
  }
  const int64_t grads = int64_t(Plan::kGradPlanes) * H;
  if (rank == 0) zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, lane, Plan::kWarps);
  if (kProjected && rank == 0) zero_tails(tile, layer.grad_projected + first_row * P, P, P, lane, Plan::kWarps);
}

}  // namespace rnnfast::cuda
