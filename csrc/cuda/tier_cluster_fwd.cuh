// Tier cluster, forward: the recurrence of 8 sequences and one direction in a cluster of CTAs, for weights that fit
// the registers of 2 to 16 SMs. sm_90 and newer.
//
// Shapes      H <= kHidden, the padded size; a CTA has a slice of kHidden / kCtas units. Padding is zero weights and
//             zero gates_x, so padded units stay 0. Grid: x = batch tiles of 8 times kCtas, y = directions.
// Ownership   A warp owns kUnits units and all their gates; W_hh's rows of those lie in its registers as the a operand
//             of mma for the whole sequence. Tiles have 16 rows: 16 units of one gate, 8 of two, or 4 of four (see
//             CellTile). c and h of a cell lie in the lane that computes it (float). All units' h lie in every CTA's
//             shared memory as the b operand, double-buffered.
// One step    h has arrived (mbarrier) | sum = W_hh h (mma), cell | the warp's new h to the other buffer of every CTA
// by
//             store_async, which tells that CTA's mbarrier how many bytes came | results to global memory while h is
//             under way. gates_x come by cp.async, kStages - 1 steps ahead, each warp for itself.
// No barrier  of cluster or block in the loop. A warp sends h of step + 1 after it has read h of step, and nobody can
// send
//             h of step + 2, which overwrites that, before h of step + 1 is complete, from all warps of all CTAs. For
//             the same reason no mbarrier is a phase ahead of a warp that waits for it.
// Exit        The last step sends nothing, so nothing is under way to a CTA that has ended.
// Saved       Training stores the activated gates (LSTM: may replace gates_x in place, a warp reads a row before it
//             writes it) and c; inference neither.
// Limits      No projection: its h would take a second exchange per step.
#pragma once

#include "tier_cluster.h"
#include "weights.cuh"

namespace rnnfast::cuda {

// How kUnits units with their gates are spread over tiles of 16 rows, and their cells over lanes. Row
// unit * kGatesPerTile + gate % kGatesPerTile of tile gate / kGatesPerTile is that gate of that unit.
template <int kUnits>
struct CellTile {
  static constexpr int kGatesPerTile = kTileRows / kUnits;
  static constexpr int kCells = kUnits * kColumns / kLanes;  // of a lane

  static RNNFAST_DEVICE int unit(Lane lane, int cell) {
    return kUnits == 16 ? 2 * lane.group + cell / 2 : kUnits == 8 ? lane.group : lane.group / 2;
  }
  static RNNFAST_DEVICE int column(Lane lane, int cell) {
    return 2 * lane.member + (kUnits == 4 ? lane.group % 2 : cell % 2);
  }
  // The gates of the lane's cells.
  template <int kTiles>
  static RNNFAST_DEVICE void gather(float (&gates)[kCells][4], const float (&sum)[kTiles][4], Lane lane) {
    if constexpr (kUnits == 4) {
      // A lane has two gates of two columns; its neighbour, of the same unit, the other two gates. Each takes a column.
      const bool odd = lane.group % 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float own = odd ? sum[0][2 * i + 1] : sum[0][2 * i];
        const float other = shuffle_xor(odd ? sum[0][2 * i] : sum[0][2 * i + 1], 4);
        gates[0][i] = odd ? other : own;
        gates[0][2 + i] = odd ? own : other;
      }
    } else {
#pragma unroll
      for (int cell = 0; cell < kCells; ++cell)
#pragma unroll
        for (int gate = 0; gate < kTiles * kGatesPerTile; ++gate)
          gates[cell][gate] = kUnits == 8 ? sum[gate / 2][2 * (gate % 2) + cell] : sum[gate][cell];
    }
  }
};

template <Product product, Cell cell, int kHidden>
struct ClusterForward {
  static constexpr int kUnits = cluster_tile(product, cell, kHidden).units;
  static constexpr int kCtas = cluster_tile(product, cell, kHidden).ctas;
  using Element = ElementOf<product>;
  using Maths = CellMath<ForwardMath<Element>>;
  using Cells = CellTile<kUnits>;
  static constexpr int kStages = ring_stages(product);
  static constexpr int kGates = gate_count(cell);
  static constexpr int kTiles = (kGates + Cells::kGatesPerTile - 1) / Cells::kGatesPerTile;
  static constexpr int kSlice = kHidden / kCtas;  // units of a CTA
  static constexpr int kWarps = kSlice / kUnits;
  static constexpr int kThreads = kWarps * kLanes;
  static_assert(kHidden % kCtas == 0 && kSlice % kUnits == 0 && kTiles * Cells::kGatesPerTile <= 4);

  using State = Operand<product, kHidden>;
  using Gates = RowStream<Element, kGates, kUnits, kLanes>;  // a warp's own
  // Exact products of 4 cells per lane need 32 registers more beside the weights.
  static constexpr int kBudget = kWeightBudget - (Arithmetic<product>::kParts == 2 && kUnits == 16 ? 32 : 0);
  using Recurrent = WeightTiles<product, kTiles, kHidden, kWarps, kBudget>;
  // Weights pass through shared memory a part of the depth at a time: the whole would not fit beside what is kept
  // there.
  static constexpr int kPartChunks = Recurrent::kChunks % 4 ? 2 : 4;
  static constexpr int kPart = kPartChunks * kChunkBytes / int(sizeof(Element));
  using Stage = RowStage<product, kPart>;
  static_assert(Recurrent::kChunks % kPartChunks == 0);

  // A warp's new h on its way: [part][column][unit], of which a lane sends pieces.
  static constexpr int kRunBytes = kUnits * int(sizeof(Element));
  using Piece = std::conditional_t<(kRunBytes < kPieceBytes), uint2, uint4>;
  static constexpr int kPieces = Arithmetic<product>::kParts * kColumns * kRunBytes / int(sizeof(Piece));
  static constexpr int kOutgoingPartBytes = kColumns * kRunBytes;
  static constexpr int kOutgoingBytes = Arithmetic<product>::kParts * kOutgoingPartBytes;
  static constexpr int kSends = (kPieces * kCtas + kLanes - 1) / kLanes;  // of a lane
  static constexpr int kArrivingBytes = Arithmetic<product>::kParts * kColumns * kHidden * int(sizeof(Element));

  // Shared memory: mbarriers, weights that are kept there, then (in turn) the stages of weights, or operands and ring.
  static constexpr int kBarriers = 0;
  static constexpr int kWeights = 128;
  static constexpr int kStates = kWeights + Recurrent::kSharedBytes;
  static constexpr int kOutgoing = kStates + 2 * State::kBytes;
  static constexpr int kRing = round_up(kOutgoing + kWarps * 2 * kOutgoingBytes, 128);
  static constexpr int kEnd = kRing + kWarps * kStages * Gates::kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kStates + kWarps * Stage::kBytes);

  // A warp's rows of W_hh, of units `first` ... of the layer.
  static RNNFAST_DEVICE void load_weights(Recurrent& recurrent, unsigned char* stage, const Element* weight_hh, int H,
                                          int first, Lane lane) {
    constexpr int kSpread = Cells::kGatesPerTile;
    const auto read = [&](int chunk, uint4& low, uint4& high) { Stage::read(stage, lane, chunk, low, high); };
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int chunk = 0; chunk < Recurrent::kChunks; chunk += kPartChunks) {
        const int depth = chunk / kPartChunks * kPart;
#pragma unroll
        for (int i = 0; i < min_of(kSpread, kGates - tile * kSpread); ++i)
          stage_rows<Stage::kMost>(stage, i == 0 ? Stage::kBytes : 0,
                                   weight_hh + (int64_t(tile * kSpread + i) * H + first) * H + depth, H,
                                   min(kUnits, H - first), min(kPart, H - depth),
                                   [&](int row) { return (row * kSpread + i) * Stage::kRowBytes; });
        recurrent.load(tile, chunk, kPartChunks, read);
      }
  }
};

// One element of an operand, in all its parts.
template <Product product>
RNNFAST_DEVICE void store_element(unsigned char* to, int part_bytes, float value) {
  using Numbers = Arithmetic<product>;
  using Element = ElementOf<product>;
  if constexpr (sizeof(Element) == 2) {
    *reinterpret_cast<Element*>(to) = from_float<Element>(value);
  } else {
    const uint32_t leading = Numbers::high(__float_as_uint(value));
    *reinterpret_cast<uint32_t*>(to) = leading;
    if constexpr (Numbers::kParts == 2)
      *reinterpret_cast<uint32_t*>(to + part_bytes) = Numbers::low(__float_as_uint(value), leading);
  }
}

template <Product product, Cell cell, int kHidden>
__global__ void __launch_bounds__(ClusterForward<product, cell, kHidden>::kThreads, 1)
    cluster_forward(const __grid_constant__ ForwardLayer<ElementOf<product>> layer) {
  using Plan = ClusterForward<product, cell, kHidden>;
  using Element = typename Plan::Element;
  using State = typename Plan::State;
  using Cells = typename Plan::Cells;
  using Gates = typename Plan::Gates;
  using Piece = typename Plan::Piece;
  constexpr int kGates = Plan::kGates, kCells = Cells::kCells, kStages = Plan::kStages;
  constexpr int kUnits = Plan::kUnits, kCtas = Plan::kCtas;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int lane_number = int(threadIdx.x) % kLanes;
  const int direction = int(blockIdx.y), H = layer.hidden_size;
  const BatchTile tile(layer, int(blockIdx.x) / kCtas, direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const int first_unit = int(cluster_rank()) * Plan::kSlice + lane.warp * kUnits;

  typename Plan::Recurrent recurrent;
  recurrent.place(shared + Plan::kWeights, lane);
  Plan::load_weights(recurrent, shared + Plan::kStates + lane.warp * Plan::Stage::kBytes, weights.weight_hh, H,
                     first_unit, lane);
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + Plan::kBarriers);  // of the two buffers of h
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
    barrier_init_fence();
    for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, Plan::kArrivingBytes);
  }
  block_sync();
  zero_shared(shared + Plan::kStates, Plan::kEnd - Plan::kStates, Plan::kThreads);
  block_sync();

  // All units of hx, in every CTA.
  for (int i = int(threadIdx.x); layer.hx && i < kColumns * kHidden / 2; i += Plan::kThreads) {
    const int column = i / (kHidden / 2), k = i % (kHidden / 2) * 2;
    if (tile.first + column >= tile.batch) continue;
    const float2 pair = load_pair(layer.hx + (int64_t(direction) * tile.batch + tile.first + column) * H, k, H);
    State::store_pair(shared + Plan::kStates, State::offset(column, k), pair.x, pair.y);
  }
  float h[kCells], c[kCells], bias_hn[kCells];
  int units[kCells], columns[kCells], lengths[kCells];  // of the layer, of the tile
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    units[i] = first_unit + Cells::unit(lane, i);
    columns[i] = Cells::column(lane, i);
    lengths[i] = units[i] < H ? tile.length(columns[i]) : 0;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + columns[i]) * H + units[i];
    const bool known = units[i] < H && tile.first + columns[i] < tile.batch;
    h[i] = known && layer.hx ? to_float(layer.hx[at]) : 0.f;
    c[i] = known && layer.cx ? to_float(layer.cx[at]) : 0.f;
    bias_hn[i] = units[i] < H && weights.bias_hn ? to_float(weights.bias_hn[units[i]]) : 0.f;
  }

  // Where this lane's pieces of the warp's new h go.
  RemoteAddress peers[Plan::kSends];
  int targets[Plan::kSends];  // within a buffer of h
  unsigned char* const outgoing = shared + Plan::kOutgoing + lane.warp * 2 * Plan::kOutgoingBytes;
#pragma unroll
  for (int i = 0; i < Plan::kSends; ++i) {
    const int number = lane_number + i * kLanes, at = number % Plan::kPieces * int(sizeof(Piece));
    const int part = at / Plan::kOutgoingPartBytes, column = at % Plan::kOutgoingPartBytes / Plan::kRunBytes;
    peers[i] = map_to_rank(shared, unsigned(min(number / Plan::kPieces, kCtas - 1)));
    targets[i] =
        part * State::kPartBytes + State::offset(column, first_unit + at % Plan::kRunBytes / int(sizeof(Element)));
  }

  const Gates stream(layer.gates_x + first_row * kGates * H + first_unit, kGates * H,
                     max(min(kUnits, H - first_unit), 0), H);
  const int stream_length = tile.length(Gates::column());
  const auto stage_of = [&](int step) {
    return shared + Plan::kRing + (lane.warp * kStages + step % kStages) * Gates::kStageBytes;
  };
  const auto fetch = [&](int step) {
    if (step < tile.steps) {
      const int t = tile.time(step);
      stream.fetch(stage_of(step), tile.row(t), t < stream_length);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) fetch(step);
  cluster_arrive();
  cluster_wait();

  const int state_offset = State::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step), buffer = step % 2;
    copy_wait<kStages - 2>();
    warp_sync();
    float x[kCells][kGates];
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int m = 0; m < kGates; ++m) x[i][m] = Gates::read_one(stage_of(step), columns[i], m, Cells::unit(lane, i));
    fetch(step + kStages - 1);  // into the stage that the step before has read
    if (step > 0) {
      barrier_wait(barriers + buffer, (step - 1) / 2 % 2);
      if (threadIdx.x == 0) barrier_arrive_expect(barriers + buffer, Plan::kArrivingBytes);
    }
    float sum[Plan::kTiles][4], gate[kCells][4];
    recurrent.multiply(sum, shared + Plan::kStates + buffer * State::kBytes, state_offset);
    Cells::gather(gate, sum, lane);

    unsigned char* const sent = outgoing + buffer * Plan::kOutgoingBytes;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const bool active = t < lengths[i];
      float (&g)[4] = gate[i];
      float value;
      if constexpr (cell == Cell::kRnn) {
        value = Plan::Maths::rnn_forward(g[0] + x[i][0], layer.relu);
      } else if constexpr (cell == Cell::kGru) {
        g[0] += x[i][0], g[1] += x[i][1];
        g[3] = g[2] + bias_hn[i];
        g[2] = x[i][2];
        value = Plan::Maths::gru_forward(g[0], g[1], g[2], g[3], h[i]);
      } else {
        float next_c = c[i];
#pragma unroll
        for (int m = 0; m < 4; ++m) g[m] += x[i][m];
        value = Plan::Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
        c[i] = active ? next_c : c[i];
      }
      h[i] = active ? value : h[i];
      store_element<product>(sent + columns[i] * Plan::kRunBytes + Cells::unit(lane, i) * int(sizeof(Element)),
                             Plan::kOutgoingPartBytes, h[i]);
    }
    if (step + 1 < tile.steps) {
      // Also orders this warp's reads of h before what its sends allow others to overwrite.
      warp_sync();
#pragma unroll
      for (int i = 0; i < Plan::kSends; ++i) {
        const int number = lane_number + i * kLanes;
        if (Plan::kPieces * kCtas % kLanes != 0 && number >= Plan::kPieces * kCtas) continue;
        const Piece piece = *reinterpret_cast<const Piece*>(sent + number % Plan::kPieces * int(sizeof(Piece)));
        store_async(peers[i] + (Plan::kStates + (1 - buffer) * State::kBytes + targets[i]), piece,
                    peers[i] + (Plan::kBarriers + (1 - buffer) * int(sizeof(Barrier))));
      }
    }
    // While h is under way.
    const int64_t row = tile.row(t);
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      if (t >= lengths[i]) continue;
      const int64_t own = row + columns[i];
      layer.output[(own * layer.directions + direction) * H + units[i]] = from_float<Element>(h[i]);
      if (cell == Cell::kRnn || layer.gates == nullptr) continue;
      Element* const gates = layer.gates + (first_row + own) * 4 * H + units[i];
#pragma unroll
      for (int m = 0; m < 4; ++m) gates[int64_t(m) * H] = from_float<Element>(gate[i][m]);
      if constexpr (cell == Cell::kLstm) layer.c[(first_row + own) * H + units[i]] = c[i];
    }
  }

#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    if (units[i] >= H || tile.first + columns[i] >= tile.batch) continue;
    const int64_t at = (int64_t(direction) * tile.batch + tile.first + columns[i]) * H + units[i];
    layer.h_n[at] = from_float<Element>(h[i]);
    if constexpr (cell == Cell::kLstm) layer.c_n[at] = from_float<Element>(c[i]);
  }
  if (cluster_rank() != 0) return;
  zero_tails(tile, layer.output + direction * H, layer.directions * H, H, lane, Plan::kWarps);
  if (cell != Cell::kRnn && layer.gates)
    zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, lane, Plan::kWarps);
  if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, lane, Plan::kWarps);
}

}  // namespace rnnfast::cuda
