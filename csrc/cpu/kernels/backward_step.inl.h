// One time step of backward: from the gate gradients of one step to those of the step before.
//
// One step   1. dh = dgates W_hh, some columns at a time, and the gradients from outside.
//            2. Without a projection: the gate gradients of the same columns, from the registers.
//               With a projection, dh is dproj. Once it is there for all columns of a row, the whole-row gradient
//               follows: dproj W_hr, then the gate gradients. It mirrors the whole-row epilogue of forward
//               (whole_row.inl.h).
// Sync       One barrier of the team at the end, and one before the whole-row gradient.
// Needs      The activated gates and c that forward saved, its output, hx, cx.

template <class E, Cell kCell>
class BackwardStep {
  using Layer = BackwardLayer<E, kCell>;
  using Worker = typename Layer::Worker;
  using C = typename Layer::C;
  using S = typename Layer::S;
  using V = typename S::V;
  using Math = CellMath<S>;
  static constexpr int kLanes = Layer::kLanes;
  static constexpr int kPlanes = Layer::kPlanes;

 public:
  explicit BackwardStep(const Layer& layer) : layer_(layer) {}

  // From step + 1 to `step`. Rows that only step + 1 has began there, so their dh is grad_hx.
  void run(const Worker& worker, int64_t step) const {
    const int64_t rows = layer_.rows_in(worker, step), later = layer_.rows_in(worker, step + 1);
    multiply_hidden(worker, step, rows, later);
    if (has_whole_row_gradient()) {
      worker.team.wait(worker.at.part);
      whole_row_gradient(worker, step, rows);
    }
    worker.team.wait(worker.at.part);
  }

  // The gradient of the state before the first step, for the rows that have it.
  void first_state(const Worker& worker) const { multiply_hidden(worker, -1, 0, layer_.rows_in(worker, 0)); }

 private:
  // Some rows of one vector of columns of dh, which are handled at once.
  struct Strip {
    int64_t first_row;  // among the slice's rows of this time
    int rows;
    int64_t column;
    int columns;  // fewer than kLanes in the last vector
    const V* dh;  // [rows, dh_stride]
    int dh_stride;
  };
  static int columns_at(int64_t column, int64_t size) { return int(std::min<int64_t>(kLanes, size - column)); }

  // Gradients from outside for the rows of a strip. null: none.
  struct Incoming {
    const E* output;
    int64_t output_stride;
    const E* final_state;
    int64_t final_stride;

    template <bool kFull>
    RNNFAST_INLINE V add(V dh, int m, int count) const {
      if (output) dh += load_part<kFull>(output + m * output_stride, count);
      if (final_state) dh += load_part<kFull>(final_state + m * final_stride, count);
      return dh;
    }
  };

  // dh of `step` for this worker's columns: dgates W_hh of the `later` rows that step + 1 has, and the gradients from
  // outside. `rows`: the rows of `step`.
  void multiply_hidden(const Worker& worker, int64_t step, int64_t rows, int64_t later) const {
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const PanelShape<E>& panels = layer_.hidden_panels;
    const int64_t stride = kPlanes * layer_.plane, slices = layer_.grid.slices, output_size = layer_.output_size;
    // The planes that multiply h: all but GRU's n_x.
    const E* dgates = own.dgates + (kCell == Cell::kGru ? layer_.plane : 0);
    const Range blocks = part_of(panels.blocks(), worker.at.part, worker.team.size());
    const V zero[TileSize::kMaxVectors] = {};
    V acc[TileSize::kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const PanelWidth width = panels.width(block);
      const int64_t column = panels.first_vector(block) * kLanes;
      for_row_tiles(later, TileSize::rows(width), [&](int64_t first, int count) {
        const E* from = dgates + layer_.kept_row(worker.d, step + 1, worker.at.slice + first * slices) * stride;
        multiply<E>(acc, width, count, Operand<E>{from, slices * stride}, panels.depth,
                    own.hidden_panel + panels.offset(block));
        const int inside = int(std::clamp<int64_t>(rows - first, 0, count));
        for (int v = 0; v < width; ++v) {
          const int64_t at = column + v * kLanes;
          arrive(worker, step, Strip{first, inside, at, columns_at(at, output_size), acc + v, width}, false);
          leave(worker, Strip{first + inside, count - inside, at, columns_at(at, output_size), acc + inside * width + v,
                              width});
        }
      });
      for (int v = 0; v < width && later < rows; ++v) {
        const int64_t at = column + v * kLanes;
        arrive(worker, step, Strip{later, int(rows - later), at, columns_at(at, output_size), zero, 0}, true);
      }
    }
  }

  // Rows whose sequence begins after this step: dh is the gradient of their initial state.
  void leave(const Worker& worker, const Strip& strip) const {
    const BackwardDirection<E, C>& given = layer_.call.direction[worker.d];
    if (!given.grad_hx) return;
    for (int m = 0; m < strip.rows; ++m) {
      const int64_t b = worker.at.slice + (strip.first_row + m) * layer_.grid.slices;
      V dh = strip.dh[m * strip.dh_stride];
      if (kCell == Cell::kGru)
        dh += S::load_first(layer_.direction[worker.d].carry + b * layer_.hidden + strip.column, strip.columns);
      Io<E>::store_first(given.grad_hx + b * layer_.output_size + strip.column, dh, strip.columns);
    }
  }

  // Rows that have this step. `ends`: it is their last one, so the gradient of the final state comes in.
  void arrive(const Worker& worker, int64_t step, const Strip& strip, bool ends) const {
    if (strip.rows == 0) return;
    const int64_t slices = layer_.grid.slices, output_size = layer_.output_size, output_stride = layer_.output_stride;
    const int64_t b = worker.at.slice + strip.first_row * slices, row = layer_.row_of(worker.d, step, b);
    const E* const outputs = layer_.call.grad_output;
    const E* final_state = layer_.call.direction[worker.d].grad_h_n;
    // GRU's carry began with it.
    const bool add_final = ends && kCell != Cell::kGru && final_state;
    const Incoming incoming{outputs ? outputs + row * output_stride + worker.d * output_size + strip.column : nullptr,
                            slices * output_stride, add_final ? final_state + b * output_size + strip.column : nullptr,
                            slices * output_size};
    if (has_whole_row_gradient()) {
      const int64_t stride = layer_.proj_stride;
      E* to = layer_.direction[worker.d].dproj + layer_.kept_row(worker.d, step, b) * stride + strip.column;
      for (int m = 0; m < strip.rows; ++m, to += slices * stride)
        Io<E>::store_first(to, incoming.template add<false>(strip.dh[m * strip.dh_stride], m, strip.columns),
                           strip.columns);
    } else {
      gate_gradients(worker, step, strip, incoming);
    }
  }

  bool has_whole_row_gradient() const { return layer_.shape.proj_size > 0; }

  // dh of o * tanh(c) = dproj W_hr, then the gate gradients. It needs all columns of dproj.
  void whole_row_gradient(const Worker& worker, int64_t step, int64_t rows) const {
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const PanelShape<E>& panels = layer_.proj_panels;
    const int64_t slices = layer_.grid.slices, stride = layer_.proj_stride;
    const Range blocks = part_of(panels.blocks(), worker.at.part, worker.team.size());
    V acc[TileSize::kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const PanelWidth width = panels.width(block);
      for_row_tiles(rows, TileSize::rows(width), [&](int64_t first, int count) {
        const E* from = own.dproj + layer_.kept_row(worker.d, step, worker.at.slice + first * slices) * stride;
        multiply<E>(acc, width, count, Operand<E>{from, slices * stride}, panels.depth,
                    own.proj_panel + panels.offset(block));
        for (int v = 0; v < width; ++v) {
          const int64_t unit = (panels.first_vector(block) + v) * kLanes;
          const Strip strip{first, count, unit, columns_at(unit, layer_.hidden), acc + v, width};
          gate_gradients(worker, step, strip, Incoming{});
        }
      });
    }
  }

  void gate_gradients(const Worker& worker, int64_t step, const Strip& strip, const Incoming& incoming) const {
    if (strip.columns == kLanes)
      gate_gradients<true>(worker, step, strip, incoming);
    else
      gate_gradients<false>(worker, step, strip, incoming);
  }

  // Local pointers advance by a row, for the reason given in cell_rows.inl.h.
  template <bool kFull>
  void gate_gradients(const Worker& worker, int64_t step, const Strip& strip, const Incoming incoming) const {
    const BackwardDirection<E, C>& direction = layer_.call.direction[worker.d];
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const Schedule& schedule = layer_.schedule;
    const int64_t hidden = layer_.hidden, plane = layer_.plane, slices = layer_.grid.slices;
    const int64_t output_stride = layer_.output_stride;
    const int64_t first = worker.at.slice + strip.first_row * slices, row = layer_.row_of(worker.d, step, first);
    const int64_t kept = layer_.kept_row(worker.d, step, first);
    const int count = strip.columns, rows = strip.rows, dh_stride = strip.dh_stride;
    const bool relu = layer_.shape.relu, projected = layer_.shape.proj_size > 0;
    // Rows below `limit` had a step before this one. The others start from hx and cx.
    const int64_t limit = step > 0 ? schedule.count[time_of(schedule, worker.d, step - 1)] : 0;
    const int64_t previous = step > 0 ? schedule.offset[time_of(schedule, worker.d, step - 1)] : 0;
    const E* const outputs = layer_.call.output + worker.d * layer_.output_size + strip.column;
    const E* const initial_h = direction.hx + strip.column;
    const E* const initial_c = kCell == Cell::kLstm ? direction.cx + strip.column : nullptr;
    const C* const cells = kCell == Cell::kLstm ? direction.cells + strip.column : nullptr;
    const E* gates =
        kCell == Cell::kRnn ? nullptr : direction.gates + row * saved_planes(kCell) * hidden + strip.column;
    E* dgates = own.dgates + kept * kPlanes * plane + strip.column;
    C* carry = kCell == Cell::kRnn ? nullptr : own.carry + first * hidden + strip.column;
    E* unprojected = projected ? own.unprojected + kept * hidden + strip.column : nullptr;
    const V* from = strip.dh;
    for (int m = 0; m < rows; ++m) {
      const int64_t b = first + m * slices;
      V dh = incoming.template add<kFull>(*from, m, count);
      if constexpr (kCell == Cell::kGru) {
        dh += load_part<kFull>(carry, count);
        const E* h_prev = b < limit ? outputs + (previous + b) * output_stride : initial_h + b * hidden;
        const auto grad =
            Math::gru_backward(dh, load_part<kFull>(gates, count), load_part<kFull>(gates + hidden, count),
                               load_part<kFull>(gates + 2 * hidden, count), load_part<kFull>(gates + 3 * hidden, count),
                               load_part<kFull>(h_prev, count));
        store_part<kFull>(dgates, grad.n_x, count);
        store_part<kFull>(dgates + plane, grad.r, count);
        store_part<kFull>(dgates + 2 * plane, grad.z, count);
        store_part<kFull>(dgates + 3 * plane, grad.n_h, count);
        store_part<kFull>(carry, grad.carry, count);
      } else if constexpr (kCell == Cell::kLstm) {
        const V c_prev = b < limit ? load_part<kFull>(cells + (previous + b) * hidden, count)
                                   : load_part<kFull>(initial_c + b * hidden, count);
        const V o = load_part<kFull>(gates + 3 * hidden, count),
                c = load_part<kFull>(cells + (row + m * slices) * hidden, count);
        const auto grad = Math::lstm_backward(dh, load_part<kFull>(carry, count), load_part<kFull>(gates, count),
                                              load_part<kFull>(gates + hidden, count),
                                              load_part<kFull>(gates + 2 * hidden, count), o, c, c_prev);
        store_part<kFull>(dgates, grad.i, count);
        store_part<kFull>(dgates + plane, grad.f, count);
        store_part<kFull>(dgates + 2 * plane, grad.g, count);
        store_part<kFull>(dgates + 3 * plane, grad.o, count);
        store_part<kFull>(carry, grad.dc, count);
        if (projected) store_part<kFull>(unprojected + m * slices * hidden, o * S::tanh(c), count);
      } else {
        const V h = load_part<kFull>(outputs + (row + m * slices) * output_stride, count);
        store_part<kFull>(dgates, Math::rnn_backward(dh, h, relu), count);
      }
      from += dh_stride;
      gates += saved_planes(kCell) * slices * hidden;
      dgates += kPlanes * slices * plane;
      carry += slices * hidden;
    }
  }

  const Layer& layer_;
};
