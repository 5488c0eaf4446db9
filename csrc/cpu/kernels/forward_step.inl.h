// One time step of forward: the products, and the epilogues that follow them.
//
// One step   1. For some blocks of units: W_hh h (or W_ih x + W_hh h), then the unit epilogue (cell_rows.inl.h).
//            2. Where a layer needs it: the whole-row epilogue (whole_row.inl.h), once all units of a row are there.
// Sync       One barrier of the team at the end, and one before the whole-row epilogue. Teams of one thread need none.
// Saved      Activated gates and c, if the call asks for them (docs/design/maths.md).

// Tiles whose activations are computed in one go. With fewer, the pipeline waits for the last rows' chain of
// exponentials (AVX2, LSTM H 64, B 16: 15.0 us per step instead of 17.4 on Zen 4). More than 4 bring nothing.
constexpr int kTilesPerFinish = 4;
// Up to kFewRows rows, vectors of units of a row take the place of rows. (Zen 4, B 1, T 100: LSTM H 32 to 512 is
// 1.03-1.14 times faster, RNN H 64 1.14 times. 2 vectors bring less.)
constexpr int kFewRows = 3, kVectorsPerFinish = 4;
static_assert(kFewRows * TileSize::kMaxVectors <= TileSize::kAccumulators &&
              TileSize::kMaxVectors <= kVectorsPerFinish);

template <class E, Cell kCell>
class ForwardStep {
  using Layer = ForwardLayer<E, kCell>;
  using Worker = typename Layer::Worker;
  using C = typename Layer::C;
  using S = typename Layer::S;
  using V = typename S::V;
  static constexpr int kLanes = Layer::kLanes;
  static constexpr int kGates = Layer::kGates;

 public:
  explicit ForwardStep(const Layer& layer) : layer_(layer), whole_row_(layer) {}

  // `rows` rows of the worker's slice at time t. ahead: W_ih x + bias of these rows; null: formed here.
  void run(const Worker& worker, int64_t step, int64_t t, const C* ahead, int64_t rows) const {
    if (ahead && rows > 0 && rows <= kFewRows)
      few_rows(worker, step, t, ahead, int(rows));
    else
      for (int64_t block = worker.blocks.first; block < worker.blocks.last; ++block)
        many_rows(worker, step, t, block, ahead + layer_.hidden_panels.position(block), rows);
    if (whole_row_.needed()) {
      worker.team.wait(worker.part);
      whole_row_.run(worker, step, t, rows);
    }
    worker.team.wait(worker.part);
  }

 private:
  // What the unit epilogue handles at once: `rows` rows of one vector of units; `across`: that many vectors of one row.
  struct Strip {
    int64_t first_row;  // among the slice's rows of this time
    int rows;
    int64_t unit;
    int units;       // fewer than kLanes in the last vector
    const C* gates;  // [rows, row_stride] W_hh h
    int row_stride;
    const C* ahead;  // [rows, ahead_stride] what is to be added: W_ih x + bias
    int64_t ahead_stride;
    int gate_stride;  // of both
    bool across = false;
  };

  bool saves(const Worker& worker) const { return layer_.call.direction[worker.d].gates; }

  Operand<E> previous_h(const Worker& worker, int64_t step) const {
    const int64_t stride = layer_.hidden_stride;
    return {layer_.direction[worker.d].h[step % 2] + worker.slice * stride, layer_.grid.slices * stride};
  }

  // All products of some blocks, then their activations: row by row for whole vectors of units, then for the rest.
  void few_rows(const Worker& worker, int64_t step, int64_t t, const C* ahead, int rows) const {
    const PanelShape<E>& panels = layer_.hidden_panels;
    const E* const packed = layer_.direction[worker.d].hidden_panel;
    const Operand<E> h = previous_h(worker, step);
    const bool save = saves(worker);
    const auto end_step = [&](const Strip& strip) {
      save ? finish<true>(worker, step, t, strip) : finish<false>(worker, step, t, strip);
    };
    constexpr int64_t kBlocks = kGates == 1 ? 1 : kVectorsPerFinish;
    V acc[kFewRows * kVectorsPerFinish * kGates + 1];  // [blocks, rows, width]; dense blocks are read past their end
    for (int64_t first = worker.blocks.first, end; first < worker.blocks.last; first = end) {
      end = std::min(first + kBlocks, worker.blocks.last);
      const int width = panels.width(first).vectors, last_width = panels.width(end - 1).vectors;
      for (int64_t block = first; block < end; ++block)
        multiply_block(acc + (block - first) * rows * width, panels, block, rows, h,
                       Layer::panel_of(packed, panels, block), layer_.call.direction[worker.d].weights.hh);
      const int64_t unit = panels.first_column(first);
      const int units = int(std::min(panels.first_column(end), layer_.shape.hidden_size) - unit);
      const int whole = units / kLanes, rest = units % kLanes;  // vectors, and units of the last one
      const int64_t position = panels.position(first);
      for (int row = 0; row < rows && whole > 0; ++row)
        end_step({row, whole, unit, kLanes, reinterpret_cast<const C*>(acc + row * width),
                  (kGates == 1 ? 1 : rows * width) * kLanes, ahead + row * layer_.ahead_stride + position,
                  kGates * kLanes, kLanes, true});
      if (rest > 0)
        end_step({0, rows, unit + whole * kLanes, rest,
                  reinterpret_cast<const C*>(acc + (kGates == 1 ? 1 : rows * kGates) * whole), last_width * kLanes,
                  ahead + position + whole * kGates * kLanes, layer_.ahead_stride, panels.gate_stride(end - 1)});
    }
  }

  // One block: a few tiles of rows, then their activations, and so on.
  void many_rows(const Worker& worker, int64_t step, int64_t t, int64_t block, const C* ahead, int64_t rows) const {
    const ForwardCall<E, C>& call = layer_.call;
    const PanelShape<E>& panels = layer_.hidden_panels;
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int64_t slices = layer_.grid.slices;
    const Operand<E> h = previous_h(worker, step);
    const Operand<E> x{call.input + (layer_.schedule.offset[t] + worker.slice) * call.input_stride,
                       slices * call.input_stride};
    const PanelWidth width = panels.width(block);
    const int unit_vectors = kGates == 1 ? width.vectors : 1;
    const int gate_stride = panels.gate_stride(block);
    const bool at_step = layer_.plan.input == InputProduct::kAtStep;
    const E* const panel = Layer::panel_of(own.hidden_panel, panels, block);
    constexpr int kCapacity = kTilesPerFinish * TileSize::kAccumulators;
    V acc[kCapacity + 1];  // [rows, width]; dense blocks are read past their end
    int64_t finished = 0;
    for_row_tiles(rows, TileSize::rows(width), [&](int64_t first, int count) {
      V* const out = acc + (first - finished) * width;
      if (at_step) {
        multiply<E>(out, width, count, x.from_row(first), layer_.input_panels.padded_depth(),
                    own.input_panel + layer_.input_panels.offset(block));
        multiply<E>(out, width, count, h.from_row(first), panels.padded_depth(), panel, true);
      } else {
        multiply_block(out, panels, block, count, h.from_row(first), panel, call.direction[worker.d].weights.hh);
      }
      const int64_t end = first + count;
      if (end < rows && (end - finished + TileSize::rows(width)) * width <= kCapacity) return;
      for (int v = 0; v < unit_vectors; ++v) {
        const int64_t unit = panels.first_column(block) + v * kLanes;
        const int units = int(std::min<int64_t>(kLanes, layer_.shape.hidden_size - unit));
        // At its step, only the bias is left to add, the same for every row.
        const C* rest = at_step ? own.bias + panels.position(block) : ahead + finished * layer_.ahead_stride;
        const Strip strip{finished,
                          int(end - finished),
                          unit,
                          units,
                          reinterpret_cast<const C*>(acc + v),
                          width * kLanes,
                          rest + v * kLanes,
                          at_step ? 0 : layer_.ahead_stride,
                          gate_stride};
        saves(worker) ? finish<true>(worker, step, t, strip) : finish<false>(worker, step, t, strip);
      }
      finished = end;
    });
  }

  template <bool kSave>
  RNNFAST_INLINE void finish(const Worker& worker, int64_t step, int64_t t, const Strip& strip) const {
    const ForwardCall<E, C>& call = layer_.call;
    const ForwardDirection<E, C>& direction = call.direction[worker.d];
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int64_t hidden = layer_.shape.hidden_size, hidden_stride = layer_.hidden_stride, slices = layer_.grid.slices;
    const int64_t b = worker.slice + strip.first_row * slices, row = layer_.schedule.offset[t] + b;
    const bool whole_row = whole_row_.needed();
    E* const h_next = own.h[(step + 1) % 2] + b * hidden_stride + strip.unit;
    CellRows<E, kCell> rows;
    rows.rows = strip.rows;
    rows.units = strip.units;
    rows.relu = layer_.shape.relu;
    rows.hidden = hidden;
    rows.gates = strip.gates;
    rows.gates_stride = strip.row_stride;
    rows.ahead = strip.ahead;
    rows.ahead_stride = strip.ahead_stride;
    rows.gate_stride = strip.gate_stride;
    rows.h_prev = own.h[step % 2] + b * hidden_stride + strip.unit;
    rows.h_stride = slices * hidden_stride;
    rows.next = whole_row ? whole_row_.input(worker.d, b) + strip.unit : h_next;
    rows.next_stride = slices * (whole_row ? whole_row_.input_stride() : hidden_stride);
    rows.output =
        whole_row ? nullptr : call.output + row * call.output_stride + worker.d * layer_.output_size + strip.unit;
    rows.output_stride = slices * call.output_stride;
    if (kCell == Cell::kLstm) rows.c = own.c + b * hidden + strip.unit;
    if (kCell == Cell::kGru) rows.bias_hidden = own.bias_hidden + strip.unit;
    if (kSave && kCell != Cell::kRnn) rows.saved = direction.gates + row * saved_planes(kCell) * hidden + strip.unit;
    if (kSave && kCell == Cell::kLstm) rows.cells = direction.cells + row * hidden + strip.unit;
    rows.c_stride = slices * hidden;
    rows.saved_stride = saved_planes(kCell) * slices * hidden;
    if (strip.across)
      rows.h_stride = rows.next_stride = rows.output_stride = rows.c_stride = rows.saved_stride = rows.bias_stride =
          kLanes;
    if (strip.units == kLanes)
      run_rows<true, kSave>(rows);
    else
      run_rows<false, kSave>(rows);
  }

  const Layer& layer_;
  const WholeRowEpilogue<E, kCell> whole_row_;
};
