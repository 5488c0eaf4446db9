// Tier cluster, backward: the recurrence of 8 sequences and one direction in a cluster of CTAs, against the
// direction's time. sm_90 and newer.
//
// Shapes      As in forward.cuh: a CTA has a slice of kHidden / kCtas units.
// Ownership   A CTA computes the gate gradients of its units. From them alone it computes its parts of dh of all units.
//             So it keeps the same rows of W_hh as in forward, transposed: they are the A operand of mma, in registers.
//             Its rows are all units of h, its depth is all gates of the CTA's own units. A warp has kTiles times 16
//             rows. A thread owns pairs of neighbouring units of one sequence, with dh, dc and c in registers (float).
// One step    wait for the parts of dh (mbarrier), one from each CTA | dh = their sum, in the order of ranks | gates,
//             c or h', grad_output from the ring, cell, gate gradients to shared and global memory | barrier of the CTA
//             | parts of dh = W_hh^T dgates (mma), each pair of units by store_async to the CTA that owns it. Parts are
//             float. That is half the traffic of gathering LSTM's 16-bit gate gradients, a quarter of float. c and h'
//             come from the ring as in cta/backward.cuh.
// Projection  dh has P units; a CTA owns those with its units' numbers. The same exchange runs once more, before the
//             cell: from its dh and its rows of W_hr a CTA computes parts of the gradient of o tanh(c) of all units.
//             W_hr lies in shared memory, because registers are full.
// Sync        Parts and gate gradients have two buffers. An exchange overwrites the parts of the one before the last.
//             A CTA sends it after it has all parts of the last one, and every CTA has a barrier between its reads of
//             the older parts and its sends of the last. (Projected, parts of dh always go to the first buffer.)
//             Such a barrier also lies between the reads of an operand and its next writes.
//             A CTA ends after it has received the last parts, of grad_hx: nothing more is under way to it.
// Saved       grad_gates (planes as in csrc/common/cell.h) and, projected, grad_projected. Products afterwards make the
//             gradients of weights, biases and x from them.
// Limits      As in forward.cuh.
#pragma once

#include "cuda/device/weights.cuh"
#include "cuda/tiers/cluster/cluster.h"

namespace rnnfast::cuda {

// The kernel's sizes and types, and its phases.
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
  using Layer = BackwardLayer<Element>;
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
  // Item: a pair of neighbouring units of one column.
  static constexpr int kAllItems = kSlice / 2 * kColumns;
  static constexpr int kItems = (kAllItems + kThreads - 1) / kThreads;  // of a thread

  // The cell's derivative needs saved gates (not RNN) and a state: LSTM c and GRU h of the previous step, RNN h of the
  // step itself.
  using State = std::conditional_t<cell == Cell::kLstm, float, Element>;
  using Gates = RowStream<Element, max_of(kSavedPlanes, 1), kSlice, kThreads>;
  using States = RowStream<State, 1, kSlice, kThreads>;
  using Outputs = RowStream<Element, 1, kSlice, kThreads>;

  static constexpr int kStatesAt = cell == Cell::kRnn ? 0 : Gates::kStageBytes;  // within a stage of the ring
  static constexpr int kOutputsAt = kStatesAt + States::kStageBytes;
  static constexpr int kStageBytes = kOutputsAt + Outputs::kStageBytes;

  // Shared memory: mbarriers and the weights that stay there. Behind them, first the stages of weights, later operands
  // and ring.
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

  // A warp's columns of a weight [planes * rows, columns]: kSlice rows of each plane, from `first` on.
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

  // The first unit of a thread's item, within the slice, and whether the item exists.
  static RNNFAST_DEVICE int unit_of(int item) { return (int(threadIdx.x) + item * kThreads) / kColumns * 2; }
  static RNNFAST_DEVICE bool item_exists(int item) {
    return kAllItems % kThreads == 0 || int(threadIdx.x) + item * kThreads < kAllItems;
  }

  // The mbarriers of the two buffers of parts, armed for the first exchange into each.
  static RNNFAST_DEVICE void init_barriers(Barrier* barriers) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_init_fence();
      for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, kPartsBytes);
    }
  }

  // Where the parts of this lane's rows of each tile go, 16 bytes for two units of two sequences: to which CTA, and to
  // which offset within a buffer of parts.
  static RNNFAST_DEVICE void find_targets(RemoteAddress (&owners)[kTiles], int (&targets)[kTiles],
                                          unsigned char* shared, const Lane& lane, int rank) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int unit = (lane.warp * kTiles + i) * kTileRows + 2 * lane.group;
      owners[i] = map_to_rank(shared, unsigned(unit / kSlice));
      targets[i] = rank * kPartBytes + unit % kSlice / 2 * kPairBytes + 2 * lane.member * int(sizeof(float2));
    }
  }

  // dh: the gradient of the step's output that comes from the step after it, or from h_n. known: the sequence exists;
  // b: its row in tensors [D, B, ..].
  static RNNFAST_DEVICE void init_item(int i, float (&dh)[2], float (&dc)[2], float (&c)[2], const Layer& layer,
                                       const BatchTile& tile, unsigned char* shared, bool known, int column, int length,
                                       int64_t b, int first_unit, int64_t first_row, int H, int P) {
    const float2 zero = {0.f, 0.f};
    const int u = first_unit + unit_of(i);
    const bool real = known && item_exists(i);
    const float2 last_dh = real && layer.grad_h_n ? load_pair(layer.grad_h_n + b * P, u, P) : zero;
    const float2 last_dc = real && layer.grad_c_n ? load_pair(layer.grad_c_n + b * H, u, H) : zero;
    dh[0] = last_dh.x, dh[1] = last_dh.y;
    dc[0] = last_dc.x, dc[1] = last_dc.y;
    if constexpr (cell != Cell::kRnn) {
      const Element* initial = cell == Cell::kLstm ? layer.cx : layer.hx;  // [D, B, H]
      if (item_exists(i))
        States::put(shared + kInitial, column, unit_of(i), known && initial ? load_pair(initial + b * H, u, H) : zero);
    }
    float2 last_c = zero;
    const int t = tile.first_time(true);
    if (cell == Cell::kLstm && item_exists(i) && t < length)
      last_c = load_pair(layer.c + (first_row + tile.row(t) + column) * H, u, H);
    c[0] = last_c.x, c[1] = last_c.y;
  }

  // Sends each CTA the parts of its units, to a buffer there.
  static RNNFAST_DEVICE void send_parts(const float (&sum)[kTiles][4], int buffer,
                                        const RemoteAddress (&owners)[kTiles], const int (&targets)[kTiles]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 part = {__float_as_uint(sum[i][0]), __float_as_uint(sum[i][2]), __float_as_uint(sum[i][1]),
                          __float_as_uint(sum[i][3])};
      store_async(owners[i] + (kParts + buffer * kPartsBytes + targets[i]), part,
                  owners[i] + (kBarriers + buffer * int(sizeof(Barrier))));
    }
  }

  // Calls take(i, sum of all CTAs' parts) for the items of a thread. before: how often the buffer was filled before.
  template <class Take>
  static RNNFAST_DEVICE void receive_parts(const unsigned char* shared, Barrier* barriers, int buffer, int before,
                                           int column, const Take& take) {
    barrier_wait(barriers + buffer, before % 2);
    if (threadIdx.x == 0) barrier_arrive_expect(barriers + buffer, kPartsBytes);
    const unsigned char* parts = shared + kParts + buffer * kPartsBytes + column * int(sizeof(float2));
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!item_exists(i)) continue;
      const unsigned char* part = parts + unit_of(i) / 2 * kPairBytes;
      float2 sum = *reinterpret_cast<const float2*>(part);
#pragma unroll
      for (int from = 1; from < kCtas; ++from) {
        const float2 next = *reinterpret_cast<const float2*>(part + from * kPartBytes);
        sum.x += next.x, sum.y += next.y;
      }
      take(i, sum);
    }
  }

  // The gate gradients of a cell. grad_h: the gradient of its h, before the projection. state: see State.
  static RNNFAST_DEVICE void apply_cell(float (&grad)[4], float& carry, float& dc, float& c, const float (&g)[4],
                                        float grad_h, float state, bool relu, bool active, bool has_previous) {
    if constexpr (cell == Cell::kRnn) {
      grad[0] = Maths::rnn_backward(grad_h, state, relu);
    } else if constexpr (cell == Cell::kGru) {
      const auto d = Maths::gru_backward(grad_h, g[0], g[1], g[2], g[3], state);
      grad[0] = d.n_x, grad[1] = d.r, grad[2] = d.z, grad[3] = d.n_h;
      carry = d.carry;
    } else {
      const auto d = Maths::lstm_backward(grad_h, dc, g[0], g[1], g[2], g[3], c, state);
      grad[0] = d.i, grad[1] = d.f, grad[2] = d.g, grad[3] = d.o;
      dc = active ? d.dc : dc;
      c = has_previous ? state : c;
    }
  }

  // An item's gradient of the projected h goes to the operand of the product with W_hr, and to memory.
  static RNNFAST_DEVICE void store_projected(int i, unsigned char* projected, const Layer& layer, float2 grad,
                                             bool active, bool aligned, int column, int64_t row, int first_unit,
                                             int P) {
    const int u = unit_of(i);
    ProjectedGrads::store_pair(projected, ProjectedGrads::offset(column, u), grad.x, grad.y);
    if (active)
      store_pairs<1>(layer.grad_projected + row * P + first_unit + u, 0, P - first_unit - u, aligned,
                     [&](int, int half) { return half ? grad.y : grad.x; });
  }

  // An item's gate gradients go to the operand of the product with W_hh, and to memory.
  static RNNFAST_DEVICE void store_grads(int u, unsigned char* operand, const Layer& layer, const float (&grad)[2][4],
                                         bool active, bool aligned, int column, int64_t row, int first_unit, int H) {
    constexpr int kFirst = kGradPlanes - kGates;  // GRU's n_x does not multiply W_hh
#pragma unroll
    for (int m = 0; m < kGates; ++m)
      GateGrads::store_pair(operand, GateGrads::offset(column, m * kSlice + u), grad[0][kFirst + m],
                            grad[1][kFirst + m]);
    if (active)
      store_pairs<kGradPlanes>(layer.grad_gates + (row * kGradPlanes) * H + first_unit + u, H, H - first_unit - u,
                               aligned, [&](int m, int half) { return grad[half][m]; });
  }

  static RNNFAST_DEVICE void store_final(const Layer& layer, const float (&dh)[kItems][2], const float (&dc)[kItems][2],
                                         const BatchTile& tile, const Lane& lane, bool known, int64_t b, int rank,
                                         int first_unit, int64_t first_row, int H, int P) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!known || !item_exists(i)) continue;
      const int u = first_unit + unit_of(i);
      store_pairs<1>(layer.grad_hx + b * P + u, 0, P - u, false, [&](int, int half) { return dh[i][half]; });
      if constexpr (cell == Cell::kLstm)
        store_pairs<1>(layer.grad_cx + b * H + u, 0, H - u, false, [&](int, int half) { return dc[i][half]; });
    }
    const int64_t grads = int64_t(kGradPlanes) * H;
    if (rank == 0) zero_tails(tile, layer.grad_gates + first_row * grads, grads, grads, lane, kWarps);
    if (kProjected && rank == 0) zero_tails(tile, layer.grad_projected + first_row * P, P, P, lane, kWarps);
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(ClusterBackward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cluster_backward(const __grid_constant__ BackwardLayer<ElementOf<arithmetic>> layer) {
  using Traits = ClusterBackward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Traits::Element;
  using GateGrads = typename Traits::GateGrads;
  using ProjectedGrads = typename Traits::ProjectedGrads;
  constexpr int kSlice = Traits::kSlice, kCtas = Traits::kCtas, kItems = Traits::kItems, kStages = Traits::kStages;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, int(blockIdx.x) / kCtas, direction);
  const int64_t first_row = int64_t(direction) * layer.rows;
  const int rank = int(cluster_rank()), first_unit = rank * kSlice;

  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  unsigned char* const weight_stage = shared + Traits::kGateGrads + lane.warp * Traits::Stage::kBytes;
  const Weights<Element>& weights = layer.weights[direction];
  recurrent.use_shared(shared + Traits::kWeights, lane);
  Traits::template load_weights<Traits::kGates>(recurrent, weight_stage, weights.weight_hh, H, P, first_unit, lane);
  if constexpr (kProjected) {
    projection.use_shared(shared + Traits::kProjectionWeights, lane);
    Traits::template load_weights<1>(projection, weight_stage, weights.weight_hr, P, H, first_unit, lane);
  }
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + Traits::kBarriers);
  Traits::init_barriers(barriers);
  block_sync();
  zero_shared(shared + Traits::kGateGrads, Traits::kEnd - Traits::kGateGrads, Traits::kThreads);
  block_sync();

  RemoteAddress owners[Traits::kTiles];
  int targets[Traits::kTiles];
  Traits::find_targets(owners, targets, shared, lane, rank);

  const int column = int(threadIdx.x) % kColumns, length = tile.length(column);
  const bool known = tile.first + column < tile.batch;
  const int64_t b = int64_t(direction) * tile.batch + tile.first + column;
  float dh[kItems][2], dc[kItems][2], c[kItems][2];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    Traits::init_item(i, dh[i], dc[i], c[i], layer, tile, shared, known, column, length, b, first_unit, first_row, H,
                      P);
  }

  const int outputs = layer.directions * P, width = max(min(kSlice, H - first_unit), 0);
  const int output_width = max(min(kSlice, P - first_unit), 0);
  const typename Traits::Gates gate_stream(layer.gates + first_row * Traits::kSavedPlanes * H + first_unit,
                                           Traits::kSavedPlanes * H, width, H);
  const typename Traits::States state_stream = [&] {
    if constexpr (cell == Cell::kLstm)
      return typename Traits::States(layer.c + first_row * H + first_unit, H, width);
    else
      return typename Traits::States(layer.output + direction * P + first_unit, outputs, width);
  }();
  const typename Traits::Outputs output_stream(layer.grad_output + direction * P + first_unit, outputs, output_width);
  const int gate_length = tile.length(Traits::Gates::column()), state_length = tile.length(Traits::States::column());
  const int output_length = tile.length(Traits::Outputs::column());
  const auto stage_of = [&](int step) { return shared + Traits::kRing + step % kStages * Traits::kStageBytes; };
  const auto row_of = [&](int step) { return tile.row(tile.time(step, true)); };
  const auto fetch = [&](int step) {
    if (step < tile.steps) {
      const int t = tile.time(step, true);
      const int64_t row = row_of(step);
      if constexpr (cell != Cell::kRnn) gate_stream.fetch(stage_of(step), row, t < gate_length);
      if (layer.grad_output) output_stream.fetch(stage_of(step) + Traits::kOutputsAt, row, t < output_length);
      unsigned char* states = stage_of(step) + Traits::kStatesAt;
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

  const auto send = [&](const float (&sum)[Traits::kTiles][4], int buffer) {
    Traits::send_parts(sum, buffer, owners, targets);
  };
  const auto receive = [&](int buffer, int before, auto take) {
    Traits::receive_parts(shared, barriers, buffer, before, column, take);
  };
  // Adds to dh what the step before this one has sent. A sequence that took no part in that step keeps its dh.
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
    const unsigned char* states = at_first ? shared + Traits::kInitial : stage + Traits::kStatesAt;
    unsigned char* const operand = shared + Traits::kGateGrads + buffer * GateGrads::kBytes;
    receive_dh(step);
    const auto grad_of_output = [&](int i) {
      const float2 from_output = Traits::Outputs::read(stage + Traits::kOutputsAt, column, 0, Traits::unit_of(i));
      return float2{dh[i][0] + from_output.x, dh[i][1] + from_output.y};
    };
    float2 hidden[kItems];  // projected: gradient of o tanh(c)
    if constexpr (kProjected) {
      unsigned char* const projected = shared + Traits::kProjectedGrads;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!Traits::item_exists(i)) continue;
        Traits::store_projected(i, projected, layer, grad_of_output(i), active, projected_aligned, column, row,
                                first_unit, P);
      }
      block_sync();
      float sum[Traits::kTiles][4];
      projection.multiply(sum, projected, ProjectedGrads::lane_offset(lane));
      send(sum, 1);
      receive(1, step, [&](int i, float2 sum) { hidden[i] = sum; });
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!Traits::item_exists(i)) continue;
      const int u = Traits::unit_of(i);
      const float2 grads = kProjected ? hidden[i] : grad_of_output(i);
      const float2 state = Traits::States::read(states, column, 0, u);
      float2 gate[4];
      if constexpr (cell != Cell::kRnn) {
#pragma unroll
        for (int m = 0; m < 4; ++m) gate[m] = Traits::Gates::read(stage, column, m, u);
      }
      float grad[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float s = half ? state.y : state.x;
        const float grad_h = half ? grads.y : grads.x;
        float g[4], carry = 0.f;
#pragma unroll
        for (int m = 0; m < (cell == Cell::kRnn ? 0 : 4); ++m) g[m] = half ? gate[m].y : gate[m].x;
        Traits::apply_cell(grad[half], carry, dc[i][half], c[i][half], g, grad_h, s, layer.relu, active, has_previous);
        dh[i][half] = active ? carry : dh[i][half];
      }
      Traits::store_grads(u, operand, layer, grad, active, grads_aligned, column, row, first_unit, H);
    }
    copy_wait<kStages - 2>();  // the next step's stage
    block_sync();

    float sum[Traits::kTiles][4];
    recurrent.multiply(sum, operand, grads_offset);
    send(sum, kProjected ? 0 : 1 - buffer);
    fetch(step + kStages);  // while the parts are under way
  }
  receive_dh(tile.steps);

  Traits::store_final(layer, dh, dc, tile, lane, known, b, rank, first_unit, first_row, H, P);
}

}  // namespace rnnfast::cuda
