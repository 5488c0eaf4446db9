// Backward of one layer: back through time, and the gradients of the weights and of the input, in one parallel region.
//
// Shapes      dgates [rows, grad_planes * H] gradients of the pre-activations (docs/design/maths.md), dproj [rows, P]
//             of the projected h; dc, or GRU's share of dh that bypasses the gates, in one [B, H] updated in place. For
//             bfloat16 dgates and dproj are bfloat16 (each plane zero-padded to whole pairs), all sums float32.
// Stretches   Time is walked in stretches of steps (stretches.h). A stretch's share of the gradients of weights and
//             input follows at once: its dgates are still in cache, and the next stretch takes their memory. Two
//             directions are one stretch: dx is the sum of both, rounded once.
// Who owns    as in forward: a thread owns a slice of the batch and a part of the columns of dh, so the product
// what        dh = dgates W_hh ends with whole vectors of dh in registers and the gate gradients follow at once.
// Sync        one barrier per step among the threads of a slice (two with a projection); among the threads of a
//             direction one before a stretch's gradients, which are cut by rows of the weight and of the input, and
//             one after.
// Needs       the activated gates and c that forward saved, its output, input, hx, cx.
// Limits      no atomics and a fixed order of every sum: results repeat bit for bit at a given number of threads.

template <class E, Cell kCell>
class Backward {
  using C = ComputeOf<E>;
  using S = Simd<C>;
  using V = typename S::V;
  using Math = CellMath<S>;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kPlanes = grad_planes(kCell), kGates = gate_count(kCell);
  // Two blocks of OuterSum for float32: training of RNN and LSTM H 128, B 64 is 1.05 times faster than with a single
  // stretch, H 512 1.01-1.03; 256 and 1024 rows no faster. bfloat16, 1024 rows: 1.03-1.06, no more with 2048 (Zen 4).
  static constexpr int64_t kStretchRows = std::max<int64_t>(512, OuterSum<E>::kDepth);

 public:
  explicit Backward(const BackwardCall<E, C>& call)
      : call_(call),
        shape_(call.shape),
        schedule_(*call.schedule),
        hidden_(shape_.hidden_size),
        plane_(whole_pairs<E>(hidden_)),
        proj_stride_(whole_pairs<E>(shape_.proj_size)),
        output_size_(shape_.output_size()),
        output_stride_(shape_.directions * output_size_),
        hidden_panels_{output_size_, kGates * plane_},
        proj_panels_{hidden_, proj_stride_},
        input_panels_{shape_.input_size, kGates * plane_},
        stretches_(schedule_, shape_.directions == 1 ? kStretchRows : schedule_.total) {
    const double flops =
        6. * schedule_.total * shape_.directions * shape_.gate_rows() * (shape_.input_size + output_size_);
    quiet_ = make_grid(call.threads, shape_.directions, schedule_.batch, hidden_panels_.blocks(),
                       shape_.gate_rows() * output_size_ * int64_t(sizeof(E)), flops, schedule_.steps);
    grid_ = quiet_.now();
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
    E *hidden_panel, *proj_panel, *input_panel;
    E* dgates;           // [kept rows, kPlanes * plane_]
    E* dproj;            // [kept rows, proj_stride_]
    E* raw;              // [kept rows, H] o * tanh(c), for the gradient of W_hr
    const E** previous;  // [rows] h before each step
    C* carry;            // [B, H] the gradient of the state that a step hands to the one before it, in place
  };

  struct Member {
    int d;
    Place place;
    Barrier barrier;
    Retreat retreat;
  };

  void lay_out_memory() {
    barriers_ = make_barriers(grid_, workspace_);
    stretches_.lay_out(workspace_);
    for (int d = 0; d < shape_.directions; ++d) {
      State& state = state_[d];
      state.hidden_panel = workspace_.take<E>(hidden_panels_.size());
      state.proj_panel = workspace_.take<E>(shape_.proj_size ? proj_panels_.size() : 0);
      state.input_panel = workspace_.take<E>(call_.grad_input ? input_panels_.size() : 0);
      const int64_t kept = stretches_.kept_rows();
      state.dgates = workspace_.take<E>(kept * kPlanes * plane_ + kMaxRows);  // OuterSum reads past the end
      state.dproj = workspace_.take<E>(kept * proj_stride_ + kMaxRows);
      state.raw = workspace_.take<E>(shape_.proj_size ? kept * hidden_ : 0);
      state.previous = workspace_.take<const E*>(schedule_.total);
      state.carry = workspace_.take<C>(kCell == Cell::kRnn ? 0 : schedule_.batch * hidden_);
    }
    // A part's units, of the gates and of the projection, and the weights that they belong to.
    const int64_t units = ceil_div(hidden_, quiet_.team()), columns = shape_.input_size + output_size_;
    const int64_t proj_units = ceil_div(shape_.proj_size, quiet_.team());
    packed_size_ = OuterSum<E>::packed_size(kPlanes, std::max(units, proj_units));
    gate_sums_size_ = OuterSum<E>::sums_size(kPlanes, units, kGates * units * columns, schedule_.total);
    proj_sums_size_ = OuterSum<E>::sums_size(1, proj_units, proj_units * hidden_, schedule_.total);
    packed_ = workspace_.take<E>(quiet_.size() * packed_size_);
    gate_sums_ = workspace_.take<C>(quiet_.size() * gate_sums_size_);
    proj_sums_ = workspace_.take<C>(quiet_.size() * proj_sums_size_);
  }

  void run_thread(int thread) {
    const Place place = place_of(grid_, thread);
    for (int d = 0; d < shape_.directions; ++d) {
      if (grid_.directions == 2 && d != place.team) continue;
      const Member member{d, place, barriers_.slice(place), barriers_.retreat_of(place)};
      prepare(member);
      barriers_.team(place).wait(place.rank);
      for (int64_t stretch = stretches_.count() - 1; stretch >= 0; --stretch) {
        run_steps(member, stretch);
        barriers_.team(place).wait(place.rank);
        for (int part = place.rank; part < quiet_.team() && call_.direction[d].grad_weight_ih; part += grid_.team())
          weight_gradients(member, part, stretch);
        if (call_.grad_input && shape_.directions == 1) input_gradients(thread, stretch);
        if (stretch > 0) barriers_.team(place).wait(place.rank);
      }
      if (call_.direction[d].grad_cx) store_grad_cx(member);
    }
    if (!call_.grad_input || shape_.directions == 1) return;
    barriers_.all().wait(thread);
    input_gradients(thread, 0);
  }

  // Packs this thread's part of the weights, notes where each row's previous h lies, sets up the carried gradients.
  void prepare(const Member& member) {
    const BackwardDirection<E, C>& direction = call_.direction[member.d];
    State& state = state_[member.d];
    const int rank = member.place.rank, team = grid_.team();
    const Range hidden = part_of(hidden_panels_.blocks(), rank, team);
    pack_transposed(state.hidden_panel, hidden_panels_, direction.weights.hh, kGates, hidden_, 0, hidden.first,
                    hidden.last);
    if (shape_.proj_size) {
      const Range proj = part_of(proj_panels_.blocks(), rank, team);
      pack_transposed(state.proj_panel, proj_panels_, direction.weights.hr, 1, shape_.proj_size, 0, proj.first,
                      proj.last);
    }
    if (call_.grad_input) {
      const Range input = part_of(input_panels_.blocks(), rank, team);
      // In the order of the planes that multiply x: GRU's are n r z, the weight's rows r z n.
      pack_transposed(state.input_panel, input_panels_, direction.weights.ih, kGates, hidden_,
                      kCell == Cell::kGru ? 2 : 0, input.first, input.last);
    }
    const Range steps = part_of(schedule_.steps, rank, team);
    for (int64_t step = steps.first; step < steps.last; ++step) {
      const int64_t t = time_of(schedule_, member.d, step);
      for (int64_t b = 0; b < schedule_.count[t]; ++b) {
        const int64_t row = schedule_.offset[t] + b;
        state.previous[row] =
            continues(member.d, step, b)
                ? call_.output + row_of(member.d, step - 1, b) * output_stride_ + member.d * output_size_
                : direction.hx + b * output_size_;
      }
    }
    const Range kept = part_of(stretches_.kept_rows(), rank, team);
    for (int64_t row = kept.first; row < kept.last; ++row) {
      for (int plane = 0; plane < kPlanes; ++plane)
        for (int64_t unit = hidden_; unit < plane_; ++unit) state.dgates[(row * kPlanes + plane) * plane_ + unit] = E{};
      for (int64_t i = shape_.proj_size; i < proj_stride_; ++i) state.dproj[row * proj_stride_ + i] = E{};
    }
    for (int64_t b = rank; b < schedule_.batch; b += team) {
      const E* grad = kCell == Cell::kLstm ? direction.grad_c_n : direction.grad_h_n;
      if (kCell == Cell::kRnn) continue;
      C* carry = state.carry + b * hidden_;
      for (int64_t unit = 0; unit < hidden_; ++unit) carry[unit] = grad ? widen(grad[b * hidden_ + unit]) : C(0);
    }
  }

  // What dc' of the first steps has left in `carry`.
  void store_grad_cx(const Member& member) {
    for (int64_t b = member.place.rank; b < schedule_.batch; b += grid_.team())
      for (int64_t i = b * hidden_; i < (b + 1) * hidden_; ++i)
        narrow(state_[member.d].carry[i], call_.direction[member.d].grad_cx + i);
  }

  // Whether sequence b has a step before this one (it starts later in the reverse direction).
  bool continues(int d, int64_t step, int64_t b) const {
    return step > 0 && b < schedule_.count[time_of(schedule_, d, step - 1)];
  }
  int64_t row_of(int d, int64_t step, int64_t b) const { return schedule_.offset[time_of(schedule_, d, step)] + b; }
  int64_t kept_row(int d, int64_t step, int64_t b) const { return stretches_.kept(time_of(schedule_, d, step)) + b; }
  int64_t rows_in(const Member& member, int64_t step) const {
    if (step < 0 || step >= schedule_.steps) return 0;
    return rows_at(schedule_, time_of(schedule_, member.d, step), member.place.slice, grid_.slices);
  }

  void run_steps(Member member, int64_t stretch) {
    const Range steps = stretches_.steps(stretch);
    for (int64_t step = steps.last - 1; step >= steps.first; --step) {
      if (grid_.units > 1 && member.retreat.alone(schedule_.steps - 1 - step, member.place.unit)) {
        if (member.place.unit != 0) return;
        member.barrier = Barrier(nullptr, 1);
      }
      run_step(member, step);
    }
    if (stretch == 0 && call_.direction[member.d].grad_hx) first_state(member);
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
    const int64_t stride = kPlanes * plane_, slices = grid_.slices;
    // The planes that multiply h: all but GRU's n_x.
    const E* dgates = state.dgates + (kCell == Cell::kGru ? plane_ : 0);
    const Range blocks = part_of(hidden_panels_.blocks(), member.place.unit, member.barrier.size());
    const V zero[kMaxVectors] = {};
    V acc[kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const PanelWidth width = hidden_panels_.width(block);
      const int64_t column = hidden_panels_.first_vector(block) * kLanes;
      for_row_tiles(later, tile_rows(width), [&](int64_t first, int count) {
        const E* from = dgates + kept_row(member.d, step + 1, member.place.slice + first * slices) * stride;
        multiply<E>(acc, width, count, Operand<E>{from, slices * stride}, hidden_panels_.depth,
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

  // Rows whose sequence begins after this step: dh is the gradient of their initial state.
  void leave(const Member& member, const Tile& tile) {
    if (!call_.direction[member.d].grad_hx) return;
    for (int m = 0; m < tile.rows; ++m) {
      const int64_t b = member.place.slice + (tile.first_row + m) * grid_.slices;
      V dh = tile.dh[m * tile.dh_stride];
      if (kCell == Cell::kGru) dh += S::load_first(state_[member.d].carry + b * hidden_ + tile.column, tile.columns);
      Io<E>::store_first(call_.direction[member.d].grad_hx + b * output_size_ + tile.column, dh, tile.columns);
    }
  }

  // Rows that have this step; `ends`: it is their last, so the gradient of the final state comes in.
  void arrive(const Member& member, int64_t step, const Tile& tile, bool ends) {
    if (tile.rows == 0) return;
    const int64_t b = member.place.slice + tile.first_row * grid_.slices, row = row_of(member.d, step, b);
    const E* final_state = call_.direction[member.d].grad_h_n;
    // GRU's carry holds it while no step has been walked.
    const bool add_final = ends && kCell != Cell::kGru && final_state;
    const Incoming incoming{
        call_.grad_output ? call_.grad_output + row * output_stride_ + member.d * output_size_ + tile.column : nullptr,
        grid_.slices * output_stride_, add_final ? final_state + b * output_size_ + tile.column : nullptr,
        grid_.slices * output_size_};
    if (shape_.proj_size) {
      E* to = state_[member.d].dproj + kept_row(member.d, step, b) * proj_stride_ + tile.column;
      for (int m = 0; m < tile.rows; ++m, to += grid_.slices * proj_stride_)
        Io<E>::store_first(to, incoming.template add<false>(tile.dh[m * tile.dh_stride], m, tile.columns),
                           tile.columns);
    } else if (tile.columns == kLanes) {
      gate_gradients<true>(member, step, tile, incoming);
    } else {
      gate_gradients<false>(member, step, tile, incoming);
    }
  }

  // Gradients from outside for the rows of a tile; null: none.
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

  // dh of o * tanh(c) = dproj W_hr, then the gate gradients.
  void proj_product(const Member& member, int64_t step, int64_t rows) {
    const State& state = state_[member.d];
    const int64_t slices = grid_.slices;
    const Range blocks = part_of(proj_panels_.blocks(), member.place.unit, member.barrier.size());
    V acc[kAccumulators];
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const PanelWidth width = proj_panels_.width(block);
      for_row_tiles(rows, tile_rows(width), [&](int64_t first, int count) {
        const E* from = state.dproj + kept_row(member.d, step, member.place.slice + first * slices) * proj_stride_;
        multiply<E>(acc, width, count, Operand<E>{from, slices * proj_stride_}, proj_panels_.depth,
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
    const BackwardDirection<E, C>& direction = call_.direction[member.d];
    const State& state = state_[member.d];
    const int64_t hidden = hidden_, plane = plane_, slices = grid_.slices, output_stride = output_stride_;
    const int64_t first = member.place.slice + tile.first_row * slices, row = row_of(member.d, step, first);
    const int64_t kept = kept_row(member.d, step, first);
    const int count = tile.columns, rows = tile.rows, dh_stride = tile.dh_stride;
    const bool relu = shape_.relu, projected = shape_.proj_size > 0;
    // Rows below `limit` had a step before this one; the others start from hx and cx.
    const int64_t limit = step > 0 ? schedule_.count[time_of(schedule_, member.d, step - 1)] : 0;
    const int64_t previous = step > 0 ? schedule_.offset[time_of(schedule_, member.d, step - 1)] : 0;
    const E* const outputs = call_.output + member.d * output_size_ + tile.column;
    const E* const initial_h = direction.hx + tile.column;
    const E* const initial_c = kCell == Cell::kLstm ? direction.cx + tile.column : nullptr;
    const C* const cells = kCell == Cell::kLstm ? direction.cells + tile.column : nullptr;
    const E* gates = kCell == Cell::kRnn ? nullptr : direction.gates + row * saved_planes(kCell) * hidden + tile.column;
    E* dgates = state.dgates + kept * kPlanes * plane + tile.column;
    C* carry = kCell == Cell::kRnn ? nullptr : state.carry + first * hidden + tile.column;
    E* raw = projected ? state.raw + kept * hidden + tile.column : nullptr;
    const V* from = tile.dh;
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
        if (projected) store_part<kFull>(raw + m * slices * hidden, o * S::tanh(c), count);
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

  // A stretch's share of a part of the rows of every weight gradient: the same units of each gate.
  void weight_gradients(const Member& member, int part, int64_t stretch) {
    const BackwardDirection<E, C>& direction = call_.direction[member.d];
    const State& state = state_[member.d];
    const Range units = part_of(hidden_, part, quiet_.team()), rows = stretches_.rows(stretch);
    const int64_t place = member.place.team * quiet_.team() + part;
    E* const packed = packed_ + place * packed_size_;
    const typename OuterSum<E>::Share share{rows.last - rows.first, stretch == stretches_.count() - 1, stretch == 0};
    // Plane of each gate, for the products with x and with h.
    static constexpr int kGruInput[] = {1, 2, 0}, kGruHidden[] = {1, 2, 3}, kInOrder[] = {0, 1, 2, 3};
    const int* x_planes = kCell == Cell::kGru ? kGruInput : kInOrder;
    const int* h_planes = kCell == Cell::kGru ? kGruHidden : kInOrder;
    const typename OuterSum<E>::Left dgates{state.dgates, kPlanes, hidden_, plane_, kPlanes * plane_};
    const OuterSum<E> sum(dgates, units, {packed, gate_sums_ + place * gate_sums_size_});
    const auto x = [&](int64_t row) { return call_.input + (rows.first + row) * shape_.input_size; };
    const auto h = [&](int64_t row) { return state.previous[rows.first + row]; };
    sum.add(share, Product{direction.grad_weight_ih, x_planes, kGates, shape_.input_size, x},
            Product{direction.grad_weight_hh, h_planes, kGates, output_size_, h});
    if (share.is_last && direction.grad_bias_ih) {
      sum.totals(direction.grad_bias_ih, x_planes, kGates);
      sum.totals(direction.grad_bias_hh, h_planes, kGates);
    }
    if (shape_.proj_size) {
      const Range columns = part_of(shape_.proj_size, part, quiet_.team());
      const typename OuterSum<E>::Left dproj{state.dproj, 1, shape_.proj_size, proj_stride_, proj_stride_};
      const OuterSum<E> proj(dproj, columns, {packed, proj_sums_ + place * proj_sums_size_});
      const auto raw = [&](int64_t row) { return state.raw + row * hidden_; };
      proj.add(share, Product{direction.grad_weight_hr, kInOrder, 1, hidden_, raw});
    }
  }

  void input_gradients(int thread, int64_t stretch) {
    for (int part = thread; part < quiet_.size(); part += grid_.size()) {
      const Range rows = stretches_.rows(stretch), own = part_of(rows.last - rows.first, part, quiet_.size());
      input_gradient(rows.first, own);
    }
  }

  // grad_input = sum over directions of dgates W_ih, for a part of the rows of a stretch, which begins with row
  // `start`.
  void input_gradient(int64_t start, Range part) {
    V acc[kAccumulators], other[kAccumulators];
    for (int64_t block = 0; block < input_panels_.blocks(); ++block) {
      const PanelWidth width = input_panels_.width(block);
      for_row_tiles(part.last - part.first, tile_rows(width), [&](int64_t first, int count) {
        for (int d = 0; d < shape_.directions; ++d) {
          multiply<E>(d ? other : acc, width, count,
                      Operand<E>{state_[d].dgates + (part.first + first) * kPlanes * plane_, kPlanes * plane_},
                      input_panels_.depth, state_[d].input_panel + input_panels_.offset(block));
        }
        if (shape_.directions == 2)
          for (int i = 0; i < count * width; ++i) acc[i] += other[i];
        for (int m = 0; m < count; ++m) {
          for (int v = 0; v < width; ++v) {
            const int64_t column = (input_panels_.first_vector(block) + v) * kLanes;
            E* out = call_.grad_input + (start + part.first + first + m) * shape_.input_size + column;
            const int64_t left = shape_.input_size - column;
            left >= kLanes ? store_part<true>(out, acc[m * width + v], kLanes)
                           : store_part<false>(out, acc[m * width + v], int(left));
          }
        }
      });
    }
  }

  const BackwardCall<E, C>& call_;
  const LayerShape& shape_;
  const Schedule& schedule_;
  const int64_t hidden_, plane_, proj_stride_, output_size_, output_stride_;
  const PanelShape<E> hidden_panels_, proj_panels_, input_panels_;
  Stretches stretches_;
  ThreadGrid quiet_, grid_;  // quiet_: where no other program holds the cores. What cuts sums must not depend on that
  Workspace workspace_;
  Barriers barriers_{};
  State state_[2];
  int64_t packed_size_ = 0, gate_sums_size_ = 0, proj_sums_size_ = 0;
  E* packed_ = nullptr;
  C *gate_sums_ = nullptr, *proj_sums_ = nullptr;
};

template <class E, Cell kCell>
bool try_backward(const BackwardCall<E, ComputeOf<E>>& call) {
  if constexpr (std::is_same_v<E, ComputeOf<E>>) {
    if (StepBackward<E, kCell>::takes(call)) return StepBackward<E, kCell>(call).run();
  }
  return Backward<E, kCell>(call).run();
}

template <class E, Cell kCell>
void backward_cell(const BackwardCall<E, ComputeOf<E>>& call) {
  if (try_backward<E, kCell>(call)) return;
  auto alone = call;
  alone.threads = 1;
  try_backward<E, kCell>(alone);
}

template <class E>
void backward(const BackwardCall<E, ComputeOf<E>>& call) {
  switch (call.shape.cell) {
    case Cell::kRnn:
      return backward_cell<E, Cell::kRnn>(call);
    case Cell::kGru:
      return backward_cell<E, Cell::kGru>(call);
    case Cell::kLstm:
      return backward_cell<E, Cell::kLstm>(call);
  }
}
