// Tier cluster, forward: the recurrence of 8 sequences and one direction in a cluster of CTAs, for weights that fit
// the registers of 2 to 16 SMs. sm_90 and newer.
//
// Shapes      H <= kHidden; projected, kHidden also bounds P. A CTA has a slice of kHidden / kCtas units.
//             Padded units have zero weights and zero gates_x, so they stay 0.
//             Grid: x = batch tiles of 8 times kCtas, y = directions.
// Ownership   A warp owns kUnits units with all their gates. Their rows of W_hh are the A operand of mma, in registers
//             for the whole sequence. Tiles have 16 rows: 16 units of one gate, 8 of two, or 4 of four (CellTile).
//             c and h of a cell are float, in the lane that computes them. h of all units is the B operand: it lies in
//             every CTA's shared memory, double-buffered.
// One step    wait for h (mbarrier) | sum = W_hh h (mma), cell | the warp's new h to the other buffer of every CTA, by
//             store_async, which counts its bytes off that CTA's mbarrier | results to global memory.
//             Each warp fetches its own gates_x by cp.async, kStages - 1 steps ahead.
// Projection  A step has two exchanges. First o tanh(c) goes to the second buffer of every CTA. Then h, P units, goes
//             to the first. A warp owns the outputs with its units' numbers. kSharers warps together own 16 outputs:
//             they split the depth of these 16 rows of W_hr, which lie in shared memory (registers are full).
//             After a barrier of the CTA each warp adds the shares of its own outputs, in one order.
// Sync        The loop has no barrier of the cluster and, without a projection, none of the CTA.
//             Invariant: exchange n+1 reuses the buffer of n-1 and cannot start until every warp of every CTA has sent
//             n, that is, has read n-1. What follows from it: docs/design/cuda.md.
//             No step is left under way: the last one sends no h, and every warp waits for the last o tanh(c).
// Saved       Training stores the activated gates and c; inference stores nothing. An LSTM may store its gates over
//             gates_x: a warp reads a row before it writes it.
// Limits      cluster_largest_hidden: what the registers of 16 SMs hold of W_hh, in float of 8. Exact products with a
//             projection take 16 for that H: shared memory of 8 has no room for W_hr beside the low parts of W_hh.
#pragma once

#include "cuda/device/exchange.cuh"
#include "cuda/device/weights.cuh"
#include "cuda/tiers/cluster/cluster.h"

namespace rnnfast::cuda {

// How kUnits units with their gates are spread over tiles of 16 rows, and their cells over lanes. A gate of a unit is
// row unit * kGatesPerTile + gate % kGatesPerTile of tile gate / kGatesPerTile.
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
      // A lane has two gates of two columns. Its neighbour has the unit's other two gates. Each lane takes a column.
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

// The kernel's sizes and types, and its phases.
template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
struct ClusterForward {
  static constexpr int kUnits = cluster_tile(arithmetic, cell, kHidden, kProjected).units;
  static constexpr int kCtas = cluster_tile(arithmetic, cell, kHidden, kProjected).ctas;
  using Element = ElementOf<arithmetic>;
  using Maths = CellMath<ForwardMath<Element>>;
  using Cells = CellTile<kUnits>;
  static constexpr int kCells = Cells::kCells;
  static constexpr int kStages = ring_stages(arithmetic);
  static constexpr int kGates = gate_count(cell);
  static constexpr int kTiles = (kGates + Cells::kGatesPerTile - 1) / Cells::kGatesPerTile;
  static constexpr int kSlice = kHidden / kCtas;  // units of a CTA
  static constexpr int kWarps = kSlice / kUnits;
  static constexpr int kThreads = kWarps * kLanes;
  static_assert(kHidden % kCtas == 0 && kSlice % kUnits == 0 && kTiles * Cells::kGatesPerTile <= 4);

  using State = Operand<arithmetic, kHidden>;
  using Layer = ForwardLayer<Element>;
  using Gates = RowStream<Element, kGates, kUnits, kLanes>;  // a warp's own
  // Registers that the weights of exact products leave: 32 for 4 cells per lane, 48 in clusters of 16 CTAs. (With 32
  // machine code of sm_100 spills: ptxas of CUDA 13.0.)
  static constexpr int kSpared = ArithmeticTraits<arithmetic>::kParts == 1 ? 0
                                 : kUnits == 16                            ? 32
                                 : kCtas == 16                             ? 48
                                                                           : 0;
  using Recurrent = WeightTiles<arithmetic, kTiles, kHidden, kWarps, kWeightBudget - kSpared>;
  // Weights pass through shared memory a part of the depth at a time. The whole does not fit beside what stays there.
  static constexpr int kPartChunks = Recurrent::kChunks % 4 ? 2 : 4;
  static constexpr int kPart = kPartChunks * kChunkBytes / int(sizeof(Element));
  using Stage = RowStage<arithmetic, kPart>;
  static_assert(Recurrent::kChunks % kPartChunks == 0);

  // The warps that own 16 outputs share the depth of their product.
  static constexpr int kSharers = kTileRows / kUnits;
  static constexpr int kShare = kHidden / kSharers;
  using Projection = WeightTiles<arithmetic, 1, kShare, kWarps, 0>;
  using Shares = PartialSums<1, kSharers>;
  static_assert(!kProjected || (cell == Cell::kLstm && kWarps % kSharers == 0 && kShare <= kPart));

  // A warp's new h (projected: o tanh(c) as well) on its way: [part][column][unit]. A lane sends pieces of it.
  static constexpr int kRunBytes = kUnits * int(sizeof(Element));
  using Piece = std::conditional_t<(kRunBytes < kPieceBytes), uint2, uint4>;
  static constexpr int kPieces = ArithmeticTraits<arithmetic>::kParts * kColumns * kRunBytes / int(sizeof(Piece));
  static constexpr int kOutgoingPartBytes = kColumns * kRunBytes;
  static constexpr int kOutgoingBytes = ArithmeticTraits<arithmetic>::kParts * kOutgoingPartBytes;
  static constexpr int kSends = (kPieces * kCtas + kLanes - 1) / kLanes;  // of a lane
  static constexpr int kArrivingBytes =
      ArithmeticTraits<arithmetic>::kParts * kColumns * kHidden * int(sizeof(Element));

  // Shared memory: mbarriers and the weights that stay there. Behind them, first the stages of weights, later operands
  // and ring.
  static constexpr int kBarriers = 0;
  static constexpr int kWeights = 128;
  static constexpr int kProjectionWeights = kWeights + Recurrent::kSharedBytes;
  static constexpr int kStates = kProjectionWeights + (kProjected ? Projection::kSharedBytes : 0);
  static constexpr int kShares = kStates + 2 * State::kBytes;
  static constexpr int kOutgoing = kShares + (kProjected ? kWarps * Shares::kTileBytes : 0);
  static constexpr int kRing = round_up(kOutgoing + kWarps * 2 * kOutgoingBytes, 128);
  static constexpr int kEnd = kRing + kWarps * kStages * Gates::kStageBytes;
  static constexpr int kSharedBytes = max_of(kEnd, kStates + kWarps * Stage::kBytes);

  // A warp's rows of W_hh, of units `first` ... of the layer.
  static RNNFAST_DEVICE void load_recurrent(Recurrent& recurrent, unsigned char* stage, const Element* weight_hh, int H,
                                            int P, int first, Lane lane) {
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
                                   weight_hh + (int64_t(tile * kSpread + i) * H + first) * P + depth, P,
                                   min(kUnits, H - first), min(kPart, P - depth),
                                   [&](int row) { return (row * kSpread + i) * Stage::kRowBytes; });
        recurrent.load(tile, chunk, kPartChunks, read);
      }
  }
  // A warp's share of 16 rows of W_hr, from output `first` on.
  static RNNFAST_DEVICE void load_projection(Projection& projection, unsigned char* stage, const Element* weight_hr,
                                             int H, int P, int first, Lane lane) {
    const int depth = lane.warp % kSharers * kShare;
    Stage::fill(stage, weight_hr + int64_t(first) * H + depth, H, P - first, min(kShare, H - depth));
    projection.load(0, 0, Projection::kChunks,
                    [&](int chunk, uint4& low, uint4& high) { Stage::read(stage, lane, chunk, low, high); });
  }
  // One element of what a warp sends, in all its parts.
  static RNNFAST_DEVICE void put(unsigned char* outgoing, int column, int unit, float value) {
    using Numbers = ArithmeticTraits<arithmetic>;
    unsigned char* const to = outgoing + column * kRunBytes + unit * int(sizeof(Element));
    if constexpr (sizeof(Element) == 2) {
      *reinterpret_cast<Element*>(to) = from_float<Element>(value);
    } else {
      const uint32_t leading = Numbers::high(__float_as_uint(value));
      *reinterpret_cast<uint32_t*>(to) = leading;
      if constexpr (Numbers::kParts == 2)
        *reinterpret_cast<uint32_t*>(to + kOutgoingPartBytes) = Numbers::low(__float_as_uint(value), leading);
    }
  }
  // Output `row` of the 16 that this warp and its sharers multiply, from the shares that they stored.
  static RNNFAST_DEVICE float output(const unsigned char* shares, Lane lane, int row, int column) {
    const int place = (row / 2 * 4 + column / 2) * 4 + row % 2 * 2 + column % 2;
    return Shares::load(shares + lane.warp / kSharers * kSharers * Shares::kTileBytes, 0, place);
  }

  // The mbarriers of the two buffers, armed for the first exchange into each.
  static RNNFAST_DEVICE void init_barriers(Barrier* barriers) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) barrier_init(barriers + i, 1);
      barrier_init_fence();
      for (int i = 0; i < 2; ++i) barrier_arrive_expect(barriers + i, kArrivingBytes);
    }
  }

  // All of hx, in every CTA.
  static RNNFAST_DEVICE void load_hx(const Layer& layer, const BatchTile& tile, unsigned char* shared, int direction,
                                     int P) {
    for (int i = int(threadIdx.x); layer.hx && i < kColumns * kHidden / 2; i += kThreads) {
      const int column = i / (kHidden / 2), k = i % (kHidden / 2) * 2;
      if (tile.first + column >= tile.batch) continue;
      const float2 pair = load_pair(layer.hx + (int64_t(direction) * tile.batch + tile.first + column) * P, k, P);
      State::store_pair(shared + kStates, State::offset(column, k), pair.x, pair.y);
    }
  }

  // Where this lane's pieces of what the warp sends go: to which CTA, and to which offset within a buffer.
  static RNNFAST_DEVICE void find_targets(RemoteAddress (&peers)[kSends], int (&targets)[kSends], unsigned char* shared,
                                          int lane_number, int first_unit) {
#pragma unroll
    for (int i = 0; i < kSends; ++i) {
      const int number = lane_number + i * kLanes, at = number % kPieces * int(sizeof(Piece));
      const int part = at / kOutgoingPartBytes, column = at % kOutgoingPartBytes / kRunBytes;
      peers[i] = map_to_rank(shared, unsigned(min(number / kPieces, kCtas - 1)));
      targets[i] = part * State::kPartBytes + State::offset(column, first_unit + at % kRunBytes / int(sizeof(Element)));
    }
  }

  // Returns the new h, projected o tanh(c). g: sums with W_hh, then the activated gates; GRU's gate 3 is W_hn h + b_hn.
  static RNNFAST_DEVICE float apply_cell(float (&g)[4], float& c, const float (&x)[kGates], float h, float bias_hn,
                                         bool relu, bool active) {
    float value;
    if constexpr (cell == Cell::kRnn) {
      value = Maths::rnn_forward(g[0] + x[0], relu);
    } else if constexpr (cell == Cell::kGru) {
      g[0] += x[0], g[1] += x[1];
      g[3] = g[2] + bias_hn;
      g[2] = x[2];
      value = Maths::gru_forward(g[0], g[1], g[2], g[3], h);
    } else {
      float next_c = c;
#pragma unroll
      for (int m = 0; m < 4; ++m) g[m] += x[m];
      value = Maths::lstm_forward(g[0], g[1], g[2], g[3], next_c);
      c = active ? next_c : c;
    }
    return value;
  }

  static RNNFAST_DEVICE void store_saved(const Layer& layer, const float (&gate)[4], float c, int64_t row, int unit,
                                         int H) {
    Element* const gates = layer.gates + row * 4 * H + unit;
#pragma unroll
    for (int m = 0; m < 4; ++m) gates[int64_t(m) * H] = from_float<Element>(gate[m]);
    if constexpr (cell == Cell::kLstm) layer.c[row * H + unit] = c;
  }

  // The state of one cell after its last step.
  static RNNFAST_DEVICE void store_state(const Layer& layer, float h, float c, const BatchTile& tile, int direction,
                                         int unit, int column, int H, int P) {
    const int64_t b = int64_t(direction) * tile.batch + tile.first + column;
    const int64_t of_h = b * P + unit, of_c = b * H + unit;
    if (!kProjected || unit < P) layer.h_n[of_h] = from_float<Element>(h);
    if constexpr (cell == Cell::kLstm) layer.c_n[of_c] = from_float<Element>(c);
  }
};

template <Arithmetic arithmetic, Cell cell, int kHidden, bool kProjected>
__global__ void __launch_bounds__(ClusterForward<arithmetic, cell, kHidden, kProjected>::kThreads, 1)
    cluster_forward(const __grid_constant__ ForwardLayer<ElementOf<arithmetic>> layer) {
  using Traits = ClusterForward<arithmetic, cell, kHidden, kProjected>;
  using Element = typename Traits::Element;
  using State = typename Traits::State;
  using Cells = typename Traits::Cells;
  using Gates = typename Traits::Gates;
  using Piece = typename Traits::Piece;
  constexpr int kGates = Traits::kGates, kCells = Cells::kCells, kStages = Traits::kStages;
  constexpr int kUnits = Traits::kUnits, kCtas = Traits::kCtas;
  unsigned char* const shared = shared_memory();
  const Lane lane;
  const int lane_number = int(threadIdx.x) % kLanes;
  const int direction = int(blockIdx.y), H = layer.hidden_size, P = kProjected ? layer.output_size : H;
  const BatchTile tile(layer, int(blockIdx.x) / kCtas, direction);
  const Weights<Element>& weights = layer.weights[direction];
  const int64_t first_row = int64_t(direction) * layer.rows;  // of tensors [D, N, ..]
  const int first_unit = int(cluster_rank()) * Traits::kSlice + lane.warp * kUnits;

  typename Traits::Recurrent recurrent;
  typename Traits::Projection projection;
  unsigned char* const weight_stage = shared + Traits::kStates + lane.warp * Traits::Stage::kBytes;
  recurrent.use_shared(shared + Traits::kWeights, lane);
  Traits::load_recurrent(recurrent, weight_stage, weights.weight_hh, H, P, first_unit, lane);
  if constexpr (kProjected) {
    projection.use_shared(shared + Traits::kProjectionWeights, lane);
    Traits::load_projection(projection, weight_stage, weights.weight_hr, H, P, first_unit / kTileRows * kTileRows,
                            lane);
  }
  Barrier* const barriers = reinterpret_cast<Barrier*>(shared + Traits::kBarriers);
  Traits::init_barriers(barriers);
  block_sync();
  zero_shared(shared + Traits::kStates, Traits::kEnd - Traits::kStates, Traits::kThreads);
  block_sync();

  Traits::load_hx(layer, tile, shared, direction, P);
  float h[kCells], c[kCells], bias_hn[kCells];
  int units[kCells], columns[kCells], lengths[kCells];
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    units[i] = first_unit + Cells::unit(lane, i);
    columns[i] = Cells::column(lane, i);
    lengths[i] = units[i] < H ? tile.length(columns[i]) : 0;
    const int64_t b = int64_t(direction) * tile.batch + tile.first + columns[i];
    const int64_t of_h = b * P + units[i], of_c = b * H + units[i];
    const bool known = units[i] < H && tile.first + columns[i] < tile.batch;
    h[i] = known && (!kProjected || units[i] < P) && layer.hx ? to_float(layer.hx[of_h]) : 0.f;
    c[i] = known && layer.cx ? to_float(layer.cx[of_c]) : 0.f;
    bias_hn[i] = units[i] < H && weights.bias_hn ? to_float(weights.bias_hn[units[i]]) : 0.f;
  }

  RemoteAddress peers[Traits::kSends];
  int targets[Traits::kSends];
  unsigned char* const outgoing = shared + Traits::kOutgoing + lane.warp * 2 * Traits::kOutgoingBytes;
  Traits::find_targets(peers, targets, shared, lane_number, first_unit);

  const Gates stream(layer.gates_x + first_row * kGates * H + first_unit, kGates * H,
                     max(min(kUnits, H - first_unit), 0), H);
  const int stream_length = tile.length(Gates::column());
  const auto stage_of = [&](int step) {
    return shared + Traits::kRing + (lane.warp * kStages + step % kStages) * Gates::kStageBytes;
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

  const auto send = [&](const unsigned char* sent, int buffer) {
    // Also orders this warp's reads of the last exchange before the overwriting that its sends allow.
    warp_sync();
#pragma unroll
    for (int i = 0; i < Traits::kSends; ++i) {
      const int number = lane_number + i * kLanes;
      if (Traits::kPieces * kCtas % kLanes != 0 && number >= Traits::kPieces * kCtas) continue;
      const Piece piece = *reinterpret_cast<const Piece*>(sent + number % Traits::kPieces * int(sizeof(Piece)));
      store_async(peers[i] + (Traits::kStates + buffer * State::kBytes + targets[i]), piece,
                  peers[i] + (Traits::kBarriers + buffer * int(sizeof(Barrier))));
    }
  };
  // before: how often the buffer was filled before. Projected: buffer 0 is for h, buffer 1 for o tanh(c).
  const auto receive = [&](int buffer, int before) {
    barrier_wait(barriers + buffer, before % 2);
    if (threadIdx.x == 0) barrier_arrive_expect(barriers + buffer, Traits::kArrivingBytes);
  };
  const auto store_output = [&](int64_t row, int unit, float value) {
    layer.output[(row * layer.directions + direction) * P + unit] = from_float<Element>(value);
  };

  const int state_offset = State::lane_offset(lane);
  for (int step = 0; step < tile.steps; ++step) {
    const int t = tile.time(step), buffer = kProjected ? 0 : step % 2;
    copy_wait<kStages - 2>();
    warp_sync();
    float x[kCells][kGates];
#pragma unroll
    for (int i = 0; i < kCells; ++i)
#pragma unroll
      for (int m = 0; m < kGates; ++m) x[i][m] = Gates::read_one(stage_of(step), columns[i], m, Cells::unit(lane, i));
    fetch(step + kStages - 1);  // into the stage that the step before has read
    if (step > 0) receive(buffer, kProjected ? step - 1 : (step - 1) / 2);
    float sum[Traits::kTiles][4], gate[kCells][4];
    recurrent.multiply(sum, shared + Traits::kStates + buffer * State::kBytes, state_offset);
    Cells::gather(gate, sum, lane);

    unsigned char* const sent = outgoing + buffer * Traits::kOutgoingBytes;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const bool active = t < lengths[i];
      float value = Traits::apply_cell(gate[i], c[i], x[i], h[i], bias_hn[i], layer.relu, active);
      if constexpr (!kProjected) value = h[i] = active ? value : h[i];
      Traits::put(sent, columns[i], Cells::unit(lane, i), value);
    }
    if (kProjected || step + 1 < tile.steps) send(sent, 1 - buffer);

    // While the exchange is under way.
    const int64_t row = tile.row(t);
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      if (t >= lengths[i]) continue;
      const int64_t own = row + columns[i];
      if constexpr (!kProjected) store_output(own, units[i], h[i]);
      if (cell == Cell::kRnn || layer.gates == nullptr) continue;
      Traits::store_saved(layer, gate[i], c[i], first_row + own, units[i], H);
    }

    if constexpr (kProjected) {
      receive(1, step);
      float share[1][4];
      projection.multiply(share, [&](int part, int chunk) {
        return State::load(shared + Traits::kStates + State::kBytes, state_offset, part,
                           lane.warp % Traits::kSharers * Traits::Projection::kChunks + chunk);
      });
      Traits::Shares::store(shared + Traits::kShares, lane, share);
      block_sync();
#pragma unroll
      for (int i = 0; i < kCells; ++i) {
        const float value = Traits::output(shared + Traits::kShares, lane, units[i] % kTileRows, columns[i]);
        h[i] = t < lengths[i] ? value : h[i];
        Traits::put(outgoing + Traits::kOutgoingBytes, columns[i], Cells::unit(lane, i), h[i]);
      }
      if (step + 1 < tile.steps) send(outgoing + Traits::kOutgoingBytes, 0);
#pragma unroll
      for (int i = 0; i < kCells; ++i)
        if (t < lengths[i] && units[i] < P) store_output(row + columns[i], units[i], h[i]);
    }
  }

#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    if (units[i] >= H || tile.first + columns[i] >= tile.batch) continue;
    Traits::store_state(layer, h[i], c[i], tile, direction, units[i], columns[i], H, P);
  }
  if (cluster_rank() != 0) return;
  zero_tails(tile, layer.output + direction * P, layer.directions * P, P, lane, Traits::kWarps);
  if (cell != Cell::kRnn && layer.gates)
    zero_tails(tile, layer.gates + first_row * 4 * H, 4 * H, 4 * H, lane, Traits::kWarps);
  if (cell == Cell::kLstm && layer.c) zero_tails(tile, layer.c + first_row * H, H, H, lane, Traits::kWarps);
}

}  // namespace rnnfast::cuda
