// Backward of one layer: back through time, then the gradients of the weights and of the input, in one parallel region.
//
// Shapes      dgates [rows, grad_planes * H] gradients of the pre-activations (planes: csrc/README.md), dproj [rows, P]
// of the
//             projected h; dc, or GRU's share of dh that bypasses the gates, in one [B, H] updated in place.
// Who owns    as in forward: a thread owns a slice of the batch and a part of the columns of dh, so the product
// what        dh = dgates W_hh ends with whole vectors of dh in registers and the gate gradients follow at once.
// Sync        one barrier per step among the threads of a slice (two with a projection); one among all threads before
// the
//             gradients of weights and input, which are cut by rows of the weight and of the input.
// Needs       the activated gates and c that forward saved, its output, input, hx, cx.
// Limits      no atomics and a fixed order of every sum: results repeat bit for bit at a given number of threads.

template <class T, Cell kCell>
class Backward {
  using S = Simd<T>;
  using V = typename S::V;
  using Math = CellMath<S>;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kPlanes = grad_planes(kCell);

 public:
  explicit Backward(const BackwardCall<T>& call)
      : call_(call),
        shape_(call.shape),
        schedule_(*call.schedule),
        hidden_(shape_.hidden_size),
        output_size_(shape_.output_size()),
        output_stride_(shape_.directions * output_size_),
        hidden_panels_{output_size_, shape_.gate_rows()},
        proj_panels_{hidden_, shape_.proj_size},
        input_panels_{shape_.input_size, shape_.gate_rows()} {
    const double flops =
        6. * schedule_.total * shape_.directions * shape_.gate_rows() * (shape_.input_size + output_size_);
    grid_ = make_grid(call.threads, shape_.directions, schedule_.batch, hidden_panels_.blocks(), flops);
    lay_out_memory();
    workspace_.allocate();
    lay_out_memory();
  }

  // False, with nothing done, if the threads could not be had.
  bool run() {
    return run_team(grid_.size(), [&](int thread) { run_thread(thread); });
  }

 private:
  struct State {
    T *hidden_panel, *proj_panel, *input_panel;
    T* dgates;           // [rows, kPlanes * H]
    T* dproj;            // [rows, P]
    T* raw;              // [rows, H] o * tanh(c), for the gradient of W_hr
    const T** previous;  // [rows] h before each step
  };

  struct Member {
    int d;
    Place place;
    Barrier barrier;
    T* scratch;  // for the weight gradients
  };

  void lay_out_memory() {
    barriers_ = make_barriers(grid_, workspace_);
    for (int d = 0; d < shape_.directions; ++d) {
      State& state = state_[d];
      state.hidden_panel = workspace_.take<T>(hidden_panels_.size());
      state.proj_panel = workspace_.take<T>(shape_.proj_size ? proj_panels_.size() : 0);
      state.input_panel = workspace_.take<T>(call_.grad_input ? input_panels_.size() : 0);
      state.dgates = workspace_.take<T>(schedule_.total * kPlanes * hidden_ + kMaxRows);  // OuterSum reads past the end
      state.dproj = workspace_.take<T>(schedule_.total * shape_.proj_size + kMaxRows);
      state.raw = workspace_.take<T>(shape_.proj_size ? schedule_.total * hidden_ : 0);
      state.previous = workspace_.take<const T*>(schedule_.total);
      // The gradient of the state that a step hands to the one before it, in place.
      const bool own = kCell == Cell::kGru || (kCell == Cell::kLstm && !call_.direction[d].grad_cx);
      T* carry = workspace_.take<T>(own ? schedule_.batch * hidden_ : 0);
      carry_[d] = own ? carry : call_.direction[d].grad_cx;
    }
    scratch_size_ = OuterSum<T>::scratch_size(kPlanes, ceil_div(hidden_, grid_.team()));
    scratch_ = workspace_.take<T>(grid_.size() * scratch_size_);
  }

  void run_thread(int thread) {
    const Place place = place_of(grid_, thread);
    for (int d = 0; d < shape_.directions; ++d) {
      if (grid_.directions == 2 && d != place.team) continue;
      const Member member{d, place, barriers_.slice(place), scratch_ + thread * scratch_size_};
      prepare(member);
      barriers_.team(place).wait(place.rank);
      for (int64_t step = schedule_.steps - 1; step >= 0; --step) run_step(member, step);
      first_state(member);
      barriers_.team(place).wait(place.rank);
      if (call_.direction[d].grad_weight_ih) weight_gradients(member);
    }
    if (!call_.grad_input) return;
    barriers_.all().wait(thread);
    input_gradient(part_of(schedule_.total, thread, grid_.size()));
  }

  // Packs this thread's part of the weights, notes where each row's previous h lies, sets up the carried gradients.
  void prepare(const Member& member) {
    const BackwardDirection<T>& direction = call_.direction[member.d];
    State& state = state_[member.d];
    const int rank = member.place.rank, team = grid_.team();
    const Range hidden = part_of(hidden_panels_.blocks(), rank, team);
    pack_panels(state.hidden_panel, hidden_panels_, direction.weights.hh, hidden.first, hidden.last, true);
    if (shape_.proj_size) {
      const Range proj = part_of(proj_panels_.blocks(), rank, team);
      pack_panels(state.proj_panel, proj_panels_, direction.weights.hr, proj.first, proj.last, true);
    }
    if (call_.grad_input) {
      const Range input = part_of(input_panels_.blocks(), rank, team);
      // In the order of the planes that multiply x: GRU's are n r z, the weight's rows r z n.
      const int64_t n_rows = kCell == Cell::kGru ? hidden_ : 0;
      pack_panels(state.input_panel, input_panels_, direction.weights.ih, input.first, input.last, true, n_rows);
    }
    const Range steps = part_of(schedule_.steps, rank, team);
    for (int64_t step = steps.first; step < steps.last; ++step) {
      const int64_t t = time_of(schedule_, member.d, step);
      for (int64_t b = 0; b < schedule_.count[t]; ++b)
        state.previous[schedule_.offset[t] + b] =
            continues(member.d, step, b)
                ? call_.output + row_of(member.d, step - 1, b) * output_stride_ + member.d * output_size_
                : direction.hx + b * output_size_;
    }
    for (int64_t b = rank; b < schedule_.batch; b += team) {
      const T* grad = kCell == Cell::kLstm ? direction.grad_c_n : direction.grad_h_n;
      if (kCell == Cell::kRnn) continue;
      T* carry = carry_[member.d] + b * hidden_;
      grad ? std::memcpy(carry, grad + b * hidden_, hidden_ * sizeof(T)) : std::memset(carry, 0, hidden_ * sizeof(T));
    }
  }

  // Whether sequence b has a step before this one (it starts later in the reverse direction).
  bool continues(int d, int64_t step, int64_t b) const {
    return step > 0 && b < schedule_.count[time_of(schedule_, d, step - 1)];
  }
  int64_t row_of(int d, int64_t step, int64_t b) const { return schedule_.offset[time_of(schedule_, d, step)] + b; }
  int64_t rows_in(const Member& member, int64_t step) const {
    if (step < 0 || step >= schedule_.steps) return 0;
    return rows_at(schedule_, time_of(schedule_, member.d, step), member.place.slice, grid_.slices);
  }

  // From the gate gradients of step + 1 to those of `step`. Rows that only step + 1 has began there: theirs is grad_hx.
  void run_step(const Member& member, int64_t step) {
    const int64_t rows = rows_in(member, step), later = rows_in(member, step + 1);
    hidden_product(member, step, rows, later);
    if (shape_.proj_size) {
      member.barrier.wait(member.place.unit);
      proj_product(member, step, rows);
    }
    member.barrier.wait(member.place.unit);
  }

  // The gradient of the state before the first step, for the rows that have it.
  void first_state(const Member& member) { hidden_product(member, -1, 0, rows_in(member, 0)); }

  // dh of `step` for this thread's columns: dgates W_hh of the `later` rows that go on, and the gradients from outside.
  void hidden_product(const Member& member, int64_t step, int64_t rows, int64_t later) {
    const State& state = state_[member.d];
    const int64_t stride = kPlanes * hidden_, slices = grid_.slices;
    // The planes that multiply h: all but GRU's n_x.
    const T* dgates = state.dgates + (kCell == Cell::kGru ? hidden_ : 0);
    const Range blocks = part_of(hidden_panels_.blocks(), member.place.unit, grid_.units);
    const V zero[kMaxVectors] = {};
    V acc[kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int width = hidden_panels_.width(block);
      const int64_t column = hidden_panels_.first_vector(block) * kLanes;
      for_row_tiles(later, tile_rows(width), [&](int64_t first, int count) {
        const T* from = dgates + row_of(member.d, step + 1, member.place.slice + first * slices) * stride;
        multiply<T>(acc, width, count, Operand<T>{from, slices * stride}, hidden_panels_.depth,
                    state.hidden_panel + hidden_panels_.offset(block));
        const int inside = int(std::clamp<int64_t>(rows - first, 0, count));
        for (int v = 0; v < width; ++v) {
          const int64_t at = column + v * kLanes;
          arrive(member, step, Tile{first, inside, at, units_at(at, output_size_), acc + v, width}, false);
          leave(member,
                Tile{first + inside, count - inside, at, units_at(at, output_size_), acc + inside * width + v, width});
        }
      });
      for (int v = 0; v < width && later < rows; ++v) {
        const int64_t at = column + v * kLanes;
        arrive(member, step, Tile{later, int(rows - later), at, units_at(at, output_size_), zero, 0}, true);
      }
    }
  }

  // `rows` rows of one vector of columns of dh.
  struct Tile {
    int64_t first_row;  // among the slice's rows of this time
    int rows;
    int64_t column;
    int columns;  // fewer than kLanes in the last vector
    const V* dh;  // [rows, dh_stride]
    int dh_stride;
  };
  static int units_at(int64_t column, int64_t size) { return int(std::min<int64_t>(kLanes, size - column)); }

  template <bool kFull>
  static RNNFAST_INLINE V load(const T* p, int count) {
    return kFull ? S::load(p) : S::load_first(p, count);
  }
  template <bool kFull>
  static RNNFAST_INLINE void store(T* p, V value, int count) {
    kFull ? S::store(p, value) : S::store_first(p, value, count);
  }

  // Rows whose sequence begins after this step: dh is the gradient of their initial state.
  void leave(const Member& member, const Tile& tile) {
    if (!call_.direction[member.d].grad_hx) return;
    for (int m = 0; m < tile.rows; ++m) {
      const int64_t b = member.place.slice + (tile.first_row + m) * grid_.slices;
      V dh = tile.dh[m * tile.dh_stride];
      if (kCell == Cell::kGru) dh += S::load_first(carry_[member.d] + b * hidden_ + tile.column, tile.columns);
      S::store_first(call_.direction[member.d].grad_hx + b * output_size_ + tile.column, dh, tile.columns);
    }
  }

  // Rows that have this step; `ends`: it is their last, so the gradient of the final state comes in.
  void arrive(const Member& member, int64_t step, const Tile& tile, bool ends) {
    if (tile.rows == 0) return;
    const int64_t b = member.place.slice + tile.first_row * grid_.slices, row = row_of(member.d, step, b);
    const T* final_state = call_.direction[member.d].grad_h_n;
    // GRU's carry holds it while no step has been walked.
    const bool add_final = ends && kCell != Cell::kGru && final_state;
    const Incoming incoming{
        call_.grad_output ? call_.grad_output + row * output_stride_ + member.d * output_size_ + tile.column : nullptr,
        grid_.slices * output_stride_, add_final ? final_state + b * output_size_ + tile.column : nullptr,
        grid_.slices * output_size_};
    if (shape_.proj_size) {
      T* to = state_[member.d].dproj + row * shape_.proj_size + tile.column;
      for (int m = 0; m < tile.rows; ++m, to += grid_.slices * shape_.proj_size)
        S::store_first(to, incoming.template add<false>(tile.dh[m * tile.dh_stride], m, tile.columns), tile.columns);
    } else if (tile.columns == kLanes) {
      gate_gradients<true>(member, step, tile, incoming);
    } else {
      gate_gradients<false>(member, step, tile, incoming);
    }
  }

  // Gradients from outside for the rows of a tile; null: none.
  struct Incoming {
    const T* output;
    int64_t output_stride;
    const T* final_state;
    int64_t final_stride;

    template <bool kFull>
    RNNFAST_INLINE V add(V dh, int m, int count) const {
      if (output) dh += load<kFull>(output + m * output_stride, count);
      if (final_state) dh += load<kFull>(final_state + m * final_stride, count);
      return dh;
    }
  };

  // dh of o * tanh(c) = dproj W_hr, then the gate gradients.
  void proj_product(const Member& member, int64_t step, int64_t rows) {
    const State& state = state_[member.d];
    const int64_t slices = grid_.slices;
    const Range blocks = part_of(proj_panels_.blocks(), member.place.unit, grid_.units);
    V acc[kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int width = proj_panels_.width(block);
      for_row_tiles(rows, tile_rows(width), [&](int64_t first, int count) {
        const T* from = state.dproj + row_of(member.d, step, member.place.slice + first * slices) * shape_.proj_size;
        multiply<T>(acc, width, count, Operand<T>{from, slices * shape_.proj_size}, proj_panels_.depth,
                    state.proj_panel + proj_panels_.offset(block));
        for (int v = 0; v < width; ++v) {
          const int64_t unit = (proj_panels_.first_vector(block) + v) * kLanes;
          const Tile tile{first, count, unit, units_at(unit, hidden_), acc + v, width};
          if (tile.columns == kLanes)
            gate_gradients<true>(member, step, tile, Incoming{});
          else
            gate_gradients<false>(member, step, tile, Incoming{});
        }
      });
    }
  }

  // Local pointers that advance by a row, for the reason given in forward.
  template <bool kFull>
  void gate_gradients(const Member& member, int64_t step, const Tile& tile, const Incoming incoming) {
    const BackwardDirection<T>& direction = call_.direction[member.d];
    const State& state = state_[member.d];
    const int64_t hidden = hidden_, slices = grid_.slices, output_stride = output_stride_;
    const int64_t first = member.place.slice + tile.first_row * slices, row = row_of(member.d, step, first);
    const int count = tile.columns, rows = tile.rows, dh_stride = tile.dh_stride;
    const bool relu = shape_.relu, projected = shape_.proj_size > 0;
    // Rows below `limit` had a step before this one; the others start from hx and cx.
    const int64_t limit = step > 0 ? schedule_.count[time_of(schedule_, member.d, step - 1)] : 0;
    const int64_t previous = step > 0 ? schedule_.offset[time_of(schedule_, member.d, step - 1)] : 0;
    const T* const outputs = call_.output + member.d * output_size_ + tile.column;
    const T* const initial_h = direction.hx + tile.column;
    const T* const initial_c = kCell == Cell::kLstm ? direction.cx + tile.column : nullptr;
    const T* const cells = kCell == Cell::kLstm ? direction.cells + tile.column : nullptr;
    const T* gates = kCell == Cell::kRnn ? nullptr : direction.gates + row * saved_planes(kCell) * hidden + tile.column;
    T* dgates = state.dgates + row * kPlanes * hidden + tile.column;
    T* carry = kCell == Cell::kRnn ? nullptr : carry_[member.d] + first * hidden + tile.column;
    T* raw = projected ? state.raw + row * hidden + tile.column : nullptr;
    const V* from = tile.dh;
    for (int m = 0; m < rows; ++m) {
      const int64_t b = first + m * slices;
      V dh = incoming.template add<kFull>(*from, m, count);
      if constexpr (kCell == Cell::kGru) {
        dh += load<kFull>(carry, count);
        const T* h_prev = b < limit ? outputs + (previous + b) * output_stride : initial_h + b * hidden;
        const auto grad = Math::gru_backward(dh, load<kFull>(gates, count), load<kFull>(gates + hidden, count),
                                             load<kFull>(gates + 2 * hidden, count),
                                             load<kFull>(gates + 3 * hidden, count), load<kFull>(h_prev, count));
        store<kFull>(dgates, grad.n_x, count);
        store<kFull>(dgates + hidden, grad.r, count);
        store<kFull>(dgates + 2 * hidden, grad.z, count);
        store<kFull>(dgates + 3 * hidden, grad.n_h, count);
        store<kFull>(carry, grad.carry, count);
      } else if constexpr (kCell == Cell::kLstm) {
        const T* c_prev = b < limit ? cells + (previous + b) * hidden : initial_c + b * hidden;
        const V o = load<kFull>(gates + 3 * hidden, count), c = load<kFull>(cells + (row + m * slices) * hidden, count);
        const auto grad = Math::lstm_backward(dh, load<kFull>(carry, count), load<kFull>(gates, count),
                                              load<kFull>(gates + hidden, count),
                                              load<kFull>(gates + 2 * hidden, count), o, c, load<kFull>(c_prev, count));
        store<kFull>(dgates, grad.i, count);
        store<kFull>(dgates + hidden, grad.f, count);
        store<kFull>(dgates + 2 * hidden, grad.g, count);
        store<kFull>(dgates + 3 * hidden, grad.o, count);
        store<kFull>(carry, grad.dc, count);
        if (projected) store<kFull>(raw + m * slices * hidden, o * S::tanh(c), count);
      } else {
        const V h = load<kFull>(outputs + (row + m * slices) * output_stride, count);
        store<kFull>(dgates, Math::rnn_backward(dh, h, relu), count);
      }
      from += dh_stride;
      gates += saved_planes(kCell) * slices * hidden;
      dgates += kPlanes * slices * hidden;
      carry += slices * hidden;
    }
  }

  // This thread's rows of every weight gradient of a direction: units in place.rank's part, for each gate.
  void weight_gradients(const Member& member) {
    const BackwardDirection<T>& direction = call_.direction[member.d];
    const State& state = state_[member.d];
    const Range units = part_of(hidden_, member.place.rank, grid_.team());
    // Plane of each gate, for the products with x and with h.
    static constexpr int kGruInput[] = {1, 2, 0}, kGruHidden[] = {1, 2, 3}, kInOrder[] = {0, 1, 2, 3};
    const int* x_planes = kCell == Cell::kGru ? kGruInput : kInOrder;
    const int* h_planes = kCell == Cell::kGru ? kGruHidden : kInOrder;
    constexpr int kGates = gate_count(kCell);
    const OuterSum<T> sum(state.dgates, kPlanes, hidden_, schedule_.total, units, member.scratch);
    const auto x = [&](int64_t row) { return call_.input + row * shape_.input_size; };
    const auto h = [&](int64_t row) { return state.previous[row]; };
    sum.run(Product{direction.grad_weight_ih, x_planes, kGates, shape_.input_size, x},
            Product{direction.grad_weight_hh, h_planes, kGates, output_size_, h});
    if (direction.grad_bias_ih) {
      sum.totals(direction.grad_bias_ih, x_planes, kGates);
      sum.totals(direction.grad_bias_hh, h_planes, kGates);
    }
    if (shape_.proj_size) {
      const Range columns = part_of(shape_.proj_size, member.place.rank, grid_.team());
      const OuterSum<T> proj(state.dproj, 1, shape_.proj_size, schedule_.total, columns, member.scratch);
      const auto raw = [&](int64_t row) { return state.raw + row * hidden_; };
      proj.run(Product{direction.grad_weight_hr, kInOrder, 1, hidden_, raw});
    }
  }

  // grad_input = sum over directions of dgates W_ih, for a range of rows.
  void input_gradient(Range rows) {
    V acc[kAccumulators], other[kAccumulators];
    for (int64_t block = 0; block < input_panels_.blocks(); ++block) {
      const int width = input_panels_.width(block);
      for_row_tiles(rows.last - rows.first, tile_rows(width), [&](int64_t first, int count) {
        const int64_t row = rows.first + first;
        for (int d = 0; d < shape_.directions; ++d) {
          multiply<T>(d ? other : acc, width, count,
                      Operand<T>{state_[d].dgates + row * kPlanes * hidden_, kPlanes * hidden_}, input_panels_.depth,
                      state_[d].input_panel + input_panels_.offset(block));
        }
        if (shape_.directions == 2)
          for (int i = 0; i < count * width; ++i) acc[i] += other[i];
        for (int m = 0; m < count; ++m) {
          for (int v = 0; v < width; ++v) {
            const int64_t column = (input_panels_.first_vector(block) + v) * kLanes;
            T* out = call_.grad_input + (row + m) * shape_.input_size + column;
            const int64_t left = shape_.input_size - column;
            left >= kLanes ? S::store(out, acc[m * width + v]) : S::store_first(out, acc[m * width + v], int(left));
          }
        }
      });
    }
  }

  const BackwardCall<T>& call_;
  const LayerShape& shape_;
  const Schedule& schedule_;
  const int64_t hidden_, output_size_, output_stride_;
  const PanelShape<T> hidden_panels_, proj_panels_, input_panels_;
  ThreadGrid grid_;
  Workspace workspace_;
  Barriers barriers_{};
  State state_[2];
  T* carry_[2] = {};
  int64_t scratch_size_ = 0;
  T* scratch_ = nullptr;
};

template <class T, Cell kCell>
void backward_cell(const BackwardCall<T>& call) {
  const auto run = [](const BackwardCall<T>& call) {
    return StepBackward<T, kCell>::takes(call) ? StepBackward<T, kCell>(call).run() : Backward<T, kCell>(call).run();
  };
  if (run(call)) return;
  auto alone = call;
  alone.threads = 1;
  run(alone);
}

template <class T>
void backward(const BackwardCall<T>& call) {
  switch (call.shape.cell) {
    case Cell::kRnn:
      return backward_cell<T, Cell::kRnn>(call);
    case Cell::kGru:
      return backward_cell<T, Cell::kGru>(call);
    case Cell::kLstm:
      return backward_cell<T, Cell::kLstm>(call);
  }
}
