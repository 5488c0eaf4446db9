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
// Buffers     Two of parts and of gate gradients. Parts for step + 2 lie where those of step were: they are sent by who
//             has all parts for step + 1, so after this CTA's barrier in step, before which all its warps read those of
//             step. The barrier in step + 1 is likewise between the reads of gate gradients in step and the next
//             writes.
// Exit        A CTA ends after it has received the last parts, of grad_hx; nothing more is under way to it.
// Stored      grad_gates (planes as in csrc/common/cell.h): gradients of weights, biases and x are products afterwards.
// c and h'    As in tier_cta_bwd.cuh: the ring brings them from the row that comes next.
// Limits      No projection, as in forward.
#pragma once

#include "tier_cluster.h"
#include "weights.cuh"

namespace rnnfast::cuda {

template <Product product, Cell cell, int kHidden>
struct ClusterBackward {
  using Element = ElementOf<product>;
  using Maths = CellMath<ExactMath>;
  static constexpr int kCtas = cluster_tile(product, cell, kHidden).ctas;
  static constexpr int kWarps = cluster_tile(product, cell, kHidden).backward_warps;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kStages = ring_stages(product);
  static constexpr int kGates = gate_count(cell);  // planes that multiply W_hh
  static constexpr int kSavedPlanes = saved_planes(cell);
  static constexpr int kGradPlanes = grad_planes(cell);  // planes in memory
  static constexpr int kSlice = kHidden / kCtas;         // units of a CTA
  static constexpr int kTiles = kHidden / kTileRows / kWarps;
  static_assert(kHidden % (kTileRows * kWarps) == 0 && kSlice % 8 == 0);

  // Depth: plane after plane of kSlice.
  static constexpr int kDepth = round_up(kGates * kSlice, kChunkBytes / int(sizeof(Element)));
  using GateGrads = Operand<product, kDepth>;
  using Recurrent = WeightTiles<product, kTiles, kDepth, kWarps>;
  using Stage = ColumnStage<product, kDepth>;

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
  static constexpr int kGateGrads = kWeights + Recurrent::kSharedBytes;
  static constexpr int kParts = kGateGrads + 2 * GateGrads::kBytes;
  static constexpr int kInitial = kParts + 2 * kPartsBytes;  // hx or cx as a stage
  static constexpr int kRing = kInitial + (cell == Cell::kRnn ? 0 : States::kStageBytes);
  static constexpr int kEnd = kRing + kStages * kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kGateGrads + kWarps * Stage::kBytes);

  // A warp's columns of W_hh, in the rows of units `first` ... of the layer.
  static RNNFAST_DEVICE void load_weights(Recurrent& recurrent, unsigned char* stage, const Element* weight_hh, int H,
                                          int first, Lane lane) {
    constexpr int kRun = Stage::kRun;
    const auto read = [&](int chunk, uint4& low, uint4& high) { Stage::read(stage, lane, chunk, low, high); };
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int column = (lane.warp * kTiles + tile) * kTileRows;
#pragma unroll
      for (int plane = 0; plane < kGates; ++plane)
        stage_rows<Stage::kMost>(stage, plane == 0 ? Stage::kBytes : 0,
                                 weight_hh + (int64_t(plane) * H + first) * H + column, H,
                                 column < H ? min(kSlice, H - first) : 0, min(kTileRows, H - column), [&](int row) {
                                   const int k = plane * kSlice + row;
                                   return k / kRun * Stage::kRunBytes + k % kRun * Stage::kMost;
                                 });
      recurrent.load(tile, 0, Recurrent::kChunks, read);
    }
  }
};

template <Product product, Cell cell, int kHidden>
__global__ void __launch_bounds__(ClusterBackward<product, cell, kHidden>::kThreads, 1)
    cluster_backward(const __grid_constant__ BackwardLayer<ElementOf<product>> layer) {
  using Plan = ClusterBackward<product, cell, kHidden>;
  using Element = typename Plan::Element;
  using GateGrads = typename Plan::GateGrads;
  constexpr int kSlice = Plan::kSlice, kCtas = Plan::kCtas, kItems = Plan::kItems, kStages = Plan::kStages;
  constexpr int kAllItems = kSlice / 2 * kColumns;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size;
  const BatchTile tile(layer, int(blockIdx.x) / kCtas, direction);
  const int64_t first_row = int64_t(direction) * layer.rows;
  const int rank = int(cluster_rank()), first_unit = rank * kSlice;

  typename Plan::Recurrent recurrent;
  recurrent.place(shared + Plan::kWeights, lane);
  Plan::load_weights(recurrent, shared + Plan::kGateGrads + lane.warp * Plan::Stage::kBytes,
                     layer.weights[direction].weight_hh, H, first_unit, lane);
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
    const float2 last_dh = real && layer.grad_h_n ? load_pair(layer.grad_h_n + b * H, u, H) : zero;
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
    const int t = tile.time(0, true);
    if (cell == Cell::kLstm && item_exists(i) && t < length)
      last_c = load_pair(layer.c + (first_row + tile.row(t) + column) * H, u, H);
    c[i][0] = last_c.x, c[i][1] = last_c.y;
  }

  const int outputs = layer.directions * H, width = max(min(kSlice, H - first_unit), 0);
  const typename Plan::Gates gate_stream(layer.gates + first_row * Plan::kSavedPlanes * H + first_unit,
                                         Plan::kSavedPlanes * H, width, H);
  const typename Plan::States state_stream = [&] {
    if constexpr (cell == Cell::kLstm)
      return typename Plan::States(layer.c + first_row * H + first_unit, H, width);
    else
      return typename Plan::States(layer.output + direction * H + first_unit, outputs, width);
  }();
  const typename Plan::Outputs output_stream(layer.grad_output + direction * H + first_unit, outputs, width);
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

  // Adds to dh what the step before this one has sent; a sequence that took no part in that keeps its dh.
  const auto receive = [&](int step) {
    if (step == 0) return;
    barrier_wait(barriers + step % 2, (step - 1) / 2 % 2);
    if (threadIdx.x == 0) barrier_arrive_expect(barriers + step % 2, Plan::kPartsBytes);
    const bool took_part = tile.time(step - 1, true) < length;
    const unsigned char* parts = shared + Plan::kParts + step % 2 * Plan::kPartsBytes + column * int(sizeof(float2));
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
      dh[i][0] += took_part ? sum.x : 0.f;
      dh[i][1] += took_part ? sum.y : 0.f;
    }
  };

  const bool grads_aligned = pairs_aligned(layer.grad_gates, H);
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
    receive(step);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!item_exists(i)) continue;
      const int u = unit_of(i);
      const float2 from_output = Plan::Outputs::read(stage + Plan::kOutputsAt, column, 0, u);
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
        const float hidden = dh[i][half] + (half ? from_output.y : from_output.x);
        float g[4], carry = 0.f;
#pragma unroll
        for (int m = 0; m < (cell == Cell::kRnn ? 0 : 4); ++m) g[m] = half ? gate[m].y : gate[m].x;
        if constexpr (cell == Cell::kRnn) {
          grad[half][0] = Plan::Maths::rnn_backward(hidden, s, layer.relu);
        } else if constexpr (cell == Cell::kGru) {
          const auto d = Plan::Maths::gru_backward(hidden, g[0], g[1], g[2], g[3], s);
          grad[half][0] = d.n_x, grad[half][1] = d.r, grad[half][2] = d.z, grad[half][3] = d.n_h;
          carry = d.carry;
        } else {
          const auto d = Plan::Maths::lstm_backward(hidden, dc[i][half], g[0], g[1], g[2], g[3], c[i][half], s);
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
#pragma unroll
    for (int i = 0; i < Plan::kTiles; ++i) {
      const uint4 part = {__float_as_uint(sum[i][0]), __float_as_uint(sum[i][2]), __float_as_uint(sum[i][1]),
                          __float_as_uint(sum[i][3])};
      store_async(owners[i] + (Plan::kParts + (1 - buffer) * Plan::kPartsBytes + targets[i]), part,
                  owners[i] + (Plan::kBarriers + (1 - buffer) * int(sizeof(Barrier))));
    }
    fetch(step + kStages);  // while the parts are under way
  }
  receive(tile.steps);

#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!known || !item_exists(i)) continue;
    const int u = first_unit + unit_of(i);
    store_pairs<1>(layer.grad_hx + b * H + u, 0, H - u, false, [&](int, int half) { return dh[i][half]; });
    if constexpr (cell == Cell::kLstm)
      store_pairs<1>(layer.grad_cx + b * H + u, 0, H - u, false, [&](int, int half) { return dc[i][half]; });
  }
  const int64_t grads = int64_t(Plan::kGradPlanes) * H;
  if (rank == 0) zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, lane, Plan::kWarps);
}

}  // namespace rnnfast::cuda
