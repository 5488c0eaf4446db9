// Forward of one layer: every time step of both directions inside one parallel region.
//
// Shapes      input [rows, I], output [rows, D * Hout]; h lives in two buffers [B, Hout] (read one, write the other),
//             zero-padded to whole pairs for bfloat16; c in one [B, H], updated in place.
// Who owns    a thread owns a slice of the batch (sequences slice, slice + slices, ...: ragged batches stay balanced)
// what        and a part of the hidden units. It computes W_ih x for its own units a chunk of time steps ahead, which
//             needs no barrier, and then runs the steps of that chunk. If other programs hold the cores, one thread
//             of a slice goes on alone (team.h, Retreat).
// Sync        one barrier per step among the threads of a slice, two with a projection; none if a slice has one thread.
// Saved       activated gates and c, when the call asks for them; docs/design/maths.md lists them.
// Limits      the weights are packed at every call (a stale copy cannot exist; calls of few rows read them in place)
//             and streamed from cache at every step.

// Tiles whose activations are computed in one go: fewer leave the pipeline waiting for the last rows' chain of
// exponentials (AVX2, LSTM H 64, B 16: 17.4 -> 15.0 us per step on Zen 4; more than 4 bring nothing).
constexpr int kTilesPerFinish = 4;
// The same for up to 3 rows: then vectors of units of a row take the place of rows (Zen 4, B 1, T 100: LSTM H 32 to 512
// 1.03-1.14 times faster, RNN H 64 1.14; with 2 vectors less).
constexpr int kFewRows = 3, kVectorsPerFinish = 4;
static_assert(kFewRows * kMaxVectors <= kAccumulators && kMaxVectors <= kVectorsPerFinish);

template <class E, Cell kCell>
class Forward {
  using C = ComputeOf<E>;
  using S = Simd<C>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kGates = gate_count(kCell);

 public:
  // wave_steps: time steps of a chunk of a wavefront, which one thread at a time computes; 0: the layer is in none.
  Forward(const ForwardCall<E, C>& call, int threads, int64_t wave_steps = 0)
      : call_(call),
        shape_(call.shape),
        schedule_(*call.schedule),
        output_size_(shape_.output_size()),
        output_stride_(call.output_stride),
        plan_(make_plan(call, threads, wave_steps)),
        grid_(plan_.grid),
        input_panels_{shape_.hidden_size, shape_.input_size, kGates, plan_.input != InputProduct::kInPlace},
        hidden_panels_{shape_.hidden_size, output_size_, kGates, plan_.input != InputProduct::kInPlace},
        proj_panels_{shape_.proj_size, shape_.hidden_size} {
    lay_out_memory();
    workspace_.allocate();
    lay_out_memory();
  }

  // False, with nothing done, if the threads could not be had.
  bool run() {
    if (!run_team(grid_.size(), [&](int thread) { run_thread(thread); })) return false;
    for (int d = 0; d < shape_.directions; ++d) store_final_states(d);
    return true;
  }

  // The same in parts, for a wavefront: first this, then every chunk in turn.
  void prepare_wave() { prepare(member_of(0, 0)); }
  void run_chunk_of_wave(int64_t chunk) {
    Member member = member_of(0, 0);
    const int64_t first = chunk * plan_.wave_steps, end = std::min(first + plan_.wave_steps, schedule_.steps);
    run_chunk(member, first, end);
    if (end == schedule_.steps) store_final_states(0);
  }

 private:
  struct State {
    E *input_panel = nullptr, *hidden_panel = nullptr, *proj_panel = nullptr;  // null: the weight is read in place
    C* bias;         // in the order of a panel's columns: b_ih + b_hh, for GRU's n only b_ih
    C* bias_hidden;  // [H padded] GRU's b_hh of n
    E* h[2];         // [B, hidden_stride_]
    C* c;            // [B, H]
    E* raw;          // [B, raw_stride_] o * tanh(c), what a projection multiplies
  };

  // One thread's share of one direction.
  struct Member {
    int d, slice, unit;
    Range blocks;    // of hidden units
    E* panel;        // one block of W_ih, where it is packed in passing
    C* ahead;        // [rows of a chunk, ahead_stride_] W_ih x + bias, of all units of the slice
    int64_t* start;  // [steps of a chunk + 1] first row in `ahead` of each time
    Barrier barrier;
    Retreat retreat;
  };

  void lay_out_memory() {
    barriers_ = make_barriers(grid_, workspace_);
    start_ = workspace_.take<int64_t>((schedule_.steps + 1) * grid_.size());
    const int64_t units = hidden_panels_.column_vectors() * kLanes;
    hidden_stride_ = hidden_panels_.padded_depth();
    raw_stride_ = proj_panels_.padded_depth();
    for (int d = 0; d < shape_.directions; ++d) {
      State& state = state_[d];
      if (plan_.input != InputProduct::kInPlace) {
        if (plan_.input != InputProduct::kInPassing) state.input_panel = workspace_.take<E>(input_panels_.size());
        state.hidden_panel = workspace_.take<E>(hidden_panels_.size());
        if (shape_.proj_size) state.proj_panel = workspace_.take<E>(proj_panels_.size());
      }
      state.bias = workspace_.take<C>(hidden_panels_.position(hidden_panels_.blocks()) + kLanes);
      state.bias_hidden = workspace_.take<C>(kCell == Cell::kGru ? units : 0);
      for (E*& h : state.h) h = workspace_.take<E>(schedule_.batch * hidden_stride_);
      state.c = workspace_.take<C>(kCell == Cell::kLstm ? schedule_.batch * shape_.hidden_size : 0);
      state.raw = workspace_.take<E>(shape_.proj_size ? schedule_.batch * raw_stride_ : 0);
    }
    const int64_t blocks = ceil_div(hidden_panels_.blocks(), plan_.quiet_units);
    const int64_t stride = std::min(blocks * kMaxVectors * kLanes, units * kGates);
    const int64_t step_rows = ceil_div(schedule_.batch, grid_.slices);
    // A chunk grows by whole steps until it holds chunk_rows_.
    chunk_rows_ = plan_.wave_steps ? plan_.wave_steps * schedule_.batch
                                   : std::max<int64_t>(kChunkBytes / (stride * sizeof(C)), kChunkTiles * kMaxRows);
    if (plan_.input == InputProduct::kInPassing) {
      chunk_rows_ = schedule_.total;
      block_size_ = kMaxVectors * kLanes * input_panels_.padded_depth();
      panel_ = workspace_.take<E>(block_size_ * grid_.size());
    }
    ahead_stride_ = hidden_panels_.position(hidden_panels_.blocks());
    ahead_size_ = std::min(chunk_rows_ + step_rows, schedule_.steps * step_rows) * ahead_stride_;
    ahead_ = workspace_.take<C>(ahead_size_ * grid_.directions * grid_.slices +
                                kLanes);  // dense blocks are read past their end
  }

  void run_thread(int thread) {
    const Place place = place_of(grid_, thread);
    for (int d = 0; d < shape_.directions; ++d) {
      if (grid_.directions == 2 && d != place.team) continue;
      const Member member = member_of(thread, d);
      prepare(member);
      barriers_.team(place).wait(place.rank);
      run_steps(member);
    }
  }

  Member member_of(int thread, int d) const {
    const Place place = place_of(grid_, thread);
    return {d,
            place.slice,
            place.unit,
            part_of(hidden_panels_.blocks(), place.unit, grid_.units),
            panel_ + thread * block_size_,
            ahead_ + (place.team * grid_.slices + place.slice) * ahead_size_,
            start_ + thread * (schedule_.steps + 1),
            barriers_.slice(place),
            barriers_.retreat_of(place)};
  }

  // Columns, gates counted, of the blocks [first, last).
  int64_t panel_width(int64_t first, int64_t last) const {
    return hidden_panels_.position(last) - hidden_panels_.position(first);
  }

  // Packs this thread's part of the weights and sets up its rows of the initial state.
  void prepare(const Member& member) {
    const DirectionWeights& weights = call_.direction[member.d].weights;
    State& state = state_[member.d];
    // The slices share the packing of a unit part among them.
    const Range share = part_of(member.blocks.last - member.blocks.first, member.slice, grid_.slices);
    const int64_t first = member.blocks.first + share.first, last = member.blocks.first + share.last;
    pack_bias(member.d, first, last);
    const Range proj =
        part_of(proj_panels_.blocks(), member.slice * grid_.units + member.unit, grid_.slices * grid_.units);
    if (state.input_panel) pack_panels(state.input_panel, input_panels_, weights.ih, first, last);
    if (state.hidden_panel) pack_panels(state.hidden_panel, hidden_panels_, weights.hh, first, last);
    if (state.proj_panel) pack_panels(state.proj_panel, proj_panels_, weights.hr, proj.first, proj.last);

    const int64_t hidden = shape_.hidden_size;
    for (int64_t b = member.slice; b < schedule_.batch; b += grid_.slices) {
      if (b / grid_.slices % grid_.units != member.unit) continue;
      for (E* h : state.h) {
        std::memcpy(h + b * hidden_stride_, call_.direction[member.d].hx + b * output_size_, output_size_ * sizeof(E));
        std::memset(h + b * hidden_stride_ + output_size_, 0, (hidden_stride_ - output_size_) * sizeof(E));
      }
      if (kCell == Cell::kLstm)
        for (int64_t u = 0; u < hidden; ++u)
          state.c[b * hidden + u] = widen(call_.direction[member.d].cx[b * hidden + u]);
      if (shape_.proj_size) std::memset(state.raw + b * raw_stride_, 0, raw_stride_ * sizeof(E));
    }
  }

  void pack_bias(int d, int64_t first, int64_t last) {
    const DirectionWeights& weights = call_.direction[d].weights;
    const int64_t first_unit = hidden_panels_.first_column(first), last_unit = hidden_panels_.first_column(last);
    if (kCell == Cell::kGru) std::memset(state_[d].bias_hidden + first_unit, 0, (last_unit - first_unit) * sizeof(C));
    C* const bias = state_[d].bias + hidden_panels_.position(first);
    std::memset(bias, 0, panel_width(first, last) * sizeof(C));
    if (!weights.bias_ih.data) return;
    for (int64_t block = first; block < last; ++block) {
      const int64_t unit = hidden_panels_.first_column(block), units = hidden_panels_.columns_in(block);
      for (int gate = 0; gate < kGates; ++gate) {
        C* const out = bias + panel_width(first, block) + gate * hidden_panels_.gate_stride(block);
        for (int64_t u = 0; u < units; ++u) {
          const int64_t row = gate * shape_.hidden_size + unit + u;
          const C from_input = widen(static_cast<const E*>(weights.bias_ih.data)[row * weights.bias_ih.row_stride]);
          const C from_hidden = widen(static_cast<const E*>(weights.bias_hh.data)[row * weights.bias_hh.row_stride]);
          const bool apart = kCell == Cell::kGru && gate == 2;  // r multiplies W_hn h + b_hn as a whole
          out[u] = apart ? from_input : from_input + from_hidden;
          if (apart) state_[d].bias_hidden[unit + u] = from_hidden;
        }
      }
    }
  }

  void run_steps(Member member) {
    for (int64_t step = 0, end; step < schedule_.steps; step = end) {
      end = end_of_chunk(member, step);
      if (!run_chunk(member, step, end)) return;
    }
  }

  // The step after the chunk that begins with `step`.
  int64_t end_of_chunk(const Member& member, int64_t step) const {
    if (plan_.input == InputProduct::kAtStep) return schedule_.steps;
    for (int64_t rows = 0; step < schedule_.steps && rows < chunk_rows_; ++step)
      rows += rows_at(schedule_, time_of(schedule_, member.d, step), member.slice, grid_.slices);
    return step;
  }

  // Steps [step, end); false if unit 0 does the rest of them alone.
  bool run_chunk(Member& member, int64_t step, int64_t end) {
    const int64_t low = std::min(time_of(schedule_, member.d, step), time_of(schedule_, member.d, end - 1));
    int64_t* const start = member.start;
    start[0] = 0;
    for (int64_t i = 0; i < end - step; ++i)
      start[i + 1] = start[i] + rows_at(schedule_, low + i, member.slice, grid_.slices);
    const bool at_step = plan_.input == InputProduct::kAtStep;
    if (!takes_part(member, step)) return false;
    if (!at_step) project_input(member, low, end - step);
    for (; step < end; ++step) {
      if (!takes_part(member, step)) return false;
      const int64_t t = time_of(schedule_, member.d, step), i = t - low;
      run_step(member, step, t, at_step ? nullptr : member.ahead + start[i] * ahead_stride_, start[i + 1] - start[i]);
    }
    return true;
  }

  // False if unit 0 does the rest of the steps without this thread, whose part of this chunk's `ahead` is there
  // already.
  bool takes_part(Member& member, int64_t step) const {
    if (grid_.units == 1 || !member.retreat.alone(step, member.unit)) return true;
    member.blocks = {0, hidden_panels_.blocks()};
    member.barrier = Barrier(nullptr, 1);
    return member.unit == 0;
  }

  // ahead = W_ih x + bias for `times` time steps from `low` on, this thread's units and rows.
  void project_input(const Member& member, int64_t low, int64_t times) {
    const int64_t products = plan_.even_rows ? 1 : times, times_each = plan_.even_rows ? times : 1;
    const Weight& weight = call_.direction[member.d].weights.ih;
    for (int64_t block = member.blocks.first; block < member.blocks.last; ++block) {
      const E* panel = panel_of(state_[member.d].input_panel, input_panels_, block);
      if (plan_.input == InputProduct::kInPassing) {
        pack_panels(member.panel - input_panels_.offset(block), input_panels_, weight, block, block + 1);
        panel = member.panel;
      }
      for (int64_t i = 0; i < products; ++i) {
        const Operand<E> x{call_.input + (schedule_.offset[low + i] + member.slice) * call_.input_stride,
                           grid_.slices * call_.input_stride};
        const int64_t rows = member.start[i + times_each] - member.start[i];
        C* out = member.ahead + member.start[i] * ahead_stride_ + input_panels_.position(block);
        project_block(member, block, panel, x, rows, out);
      }
    }
  }

  // acc = A W^T for one block of columns; panel null: from the weight itself.
  static void product(V* acc, const PanelShape<E>& shape, int64_t block, int rows, Operand<E> a, const E* panel,
                      const Weight& weight) {
    if (panel)
      multiply<E>(acc, shape.width(block), rows, a, shape.padded_depth(), panel);
    else
      multiply_direct<E>(acc, shape, block, rows, a, weight);
  }
  static const E* panel_of(const E* panels, const PanelShape<E>& shape, int64_t block) {
    return panels ? panels + shape.offset(block) : nullptr;
  }

  void project_block(const Member& member, int64_t block, const E* panel, Operand<E> x, int64_t rows, C* out) {
    const State& state = state_[member.d];
    const DirectionWeights& weights = call_.direction[member.d].weights;
    const PanelWidth width = input_panels_.width(block);
    const C* bias = state.bias + input_panels_.position(block);
    V acc[kAccumulators];
    for_row_tiles(rows, tile_rows(width), [&](int64_t first, int count) {
      product(acc, input_panels_, block, count, x.from_row(first), panel, weights.ih);
      for (int m = 0; m < count; ++m)
        for (int v = 0; v < width; ++v)
          S::store(out + (first + m) * ahead_stride_ + v * kLanes, acc[m * width + v] + S::load(bias + v * kLanes));
    });
  }

  void run_step(const Member& member, int64_t step, int64_t t, const C* ahead, int64_t rows) {
    if (ahead && rows > 0 && rows <= kFewRows)
      step_few_rows(member, step, t, ahead, int(rows));
    else
      for (int64_t block = member.blocks.first; block < member.blocks.last; ++block)
        step_block(member, step, t, block, ahead + hidden_panels_.position(block), rows);
    if (shape_.proj_size) {
      member.barrier.wait(member.unit);
      const Range blocks = part_of(proj_panels_.blocks(), member.unit, member.barrier.size());
      for (int64_t block = blocks.first; block < blocks.last; ++block) proj_block(member, step, t, block, rows);
    }
    member.barrier.wait(member.unit);
  }

  // All products of some blocks, then their activations: whole vectors of units of each row, and those of the last one.
  void step_few_rows(const Member& member, int64_t step, int64_t t, const C* ahead, int rows) {
    const State& state = state_[member.d];
    const Operand<E> h{state.h[step % 2] + member.slice * hidden_stride_, grid_.slices * hidden_stride_};
    const bool save = call_.direction[member.d].gates;
    const auto end_step = [&](const Tile& tile) {
      save ? finish<true>(member, step, t, tile) : finish<false>(member, step, t, tile);
    };
    constexpr int64_t kBlocks = kGates == 1 ? 1 : kVectorsPerFinish;
    V acc[kFewRows * kVectorsPerFinish * kGates + 1];  // [blocks, rows, width]; dense blocks are read past their end
    for (int64_t first = member.blocks.first, end; first < member.blocks.last; first = end) {
      end = std::min(first + kBlocks, member.blocks.last);
      const int width = hidden_panels_.width(first).vectors, last_width = hidden_panels_.width(end - 1).vectors;
      for (int64_t block = first; block < end; ++block)
        product(acc + (block - first) * rows * width, hidden_panels_, block, rows, h,
                panel_of(state.hidden_panel, hidden_panels_, block), call_.direction[member.d].weights.hh);
      const int64_t unit = hidden_panels_.first_column(first);
      const int units = int(std::min(hidden_panels_.first_column(end), shape_.hidden_size) - unit);
      const int whole = units / kLanes, rest = units % kLanes;  // vectors, and units of the last one
      const int64_t position = hidden_panels_.position(first);
      for (int row = 0; row < rows && whole > 0; ++row)
        end_step({row, whole, unit, kLanes, reinterpret_cast<const C*>(acc + row * width),
                  (kGates == 1 ? 1 : rows * width) * kLanes, ahead + row * ahead_stride_ + position, kGates * kLanes,
                  kLanes, true});
      if (rest > 0)
        end_step({0, rows, unit + whole * kLanes, rest,
                  reinterpret_cast<const C*>(acc + (kGates == 1 ? 1 : rows * kGates) * whole), last_width * kLanes,
                  ahead + position + whole * kGates * kLanes, ahead_stride_, hidden_panels_.gate_stride(end - 1)});
    }
  }

  void step_block(const Member& member, int64_t step, int64_t t, int64_t block, const C* ahead, int64_t rows) {
    const State& state = state_[member.d];
    const DirectionWeights& weights = call_.direction[member.d].weights;
    const Operand<E> h{state.h[step % 2] + member.slice * hidden_stride_, grid_.slices * hidden_stride_};
    const Operand<E> x{call_.input + (schedule_.offset[t] + member.slice) * call_.input_stride,
                       grid_.slices * call_.input_stride};
    const PanelWidth width = hidden_panels_.width(block);
    const int unit_vectors = kGates == 1 ? width.vectors : 1;
    const int gate_stride = hidden_panels_.gate_stride(block);
    const bool at_step = plan_.input == InputProduct::kAtStep;
    const E* const panel = panel_of(state.hidden_panel, hidden_panels_, block);
    constexpr int kCapacity = kTilesPerFinish * kAccumulators;
    V acc[kCapacity + 1];  // [rows, width]; dense blocks are read past their end
    int64_t finished = 0;
    for_row_tiles(rows, tile_rows(width), [&](int64_t first, int count) {
      V* const out = acc + (first - finished) * width;
      if (at_step) {
        multiply<E>(out, width, count, x.from_row(first), input_panels_.padded_depth(),
                    state.input_panel + input_panels_.offset(block));
        multiply<E>(out, width, count, h.from_row(first), hidden_panels_.padded_depth(), panel, true);
      } else {
        product(out, hidden_panels_, block, count, h.from_row(first), panel, weights.hh);
      }
      const int64_t end = first + count;
      if (end < rows && (end - finished + tile_rows(width)) * width <= kCapacity) return;
      for (int v = 0; v < unit_vectors; ++v) {
        const int64_t unit = hidden_panels_.first_column(block) + v * kLanes;
        const int units = int(std::min<int64_t>(kLanes, shape_.hidden_size - unit));
        // At its step, only the bias is left to add, the same for every row.
        const C* rest = at_step ? state.bias + hidden_panels_.position(block) : ahead + finished * ahead_stride_;
        const Tile tile{finished,
                        int(end - finished),
                        unit,
                        units,
                        reinterpret_cast<const C*>(acc + v),
                        width * kLanes,
                        rest + v * kLanes,
                        at_step ? 0 : ahead_stride_,
                        gate_stride};
        call_.direction[member.d].gates ? finish<true>(member, step, t, tile) : finish<false>(member, step, t, tile);
      }
      finished = end;
    });
  }

  // `rows` rows of one vector of units; `across`: that many vectors of one row.
  struct Tile {
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

  template <bool kSave>
  void finish(const Member& member, int64_t step, int64_t t, const Tile& tile) {
    const State& state = state_[member.d];
    const ForwardDirection<E, C>& direction = call_.direction[member.d];
    const int64_t hidden = shape_.hidden_size, slices = grid_.slices;
    const int64_t b = member.slice + tile.first_row * slices, row = schedule_.offset[t] + b;
    E* const h_next = state.h[(step + 1) % 2] + b * hidden_stride_ + tile.unit;
    CellRows<E, kCell> rows;
    rows.rows = tile.rows;
    rows.units = tile.units;
    rows.relu = shape_.relu;
    rows.hidden = hidden;
    rows.gates = tile.gates;
    rows.gates_stride = tile.row_stride;
    rows.ahead = tile.ahead;
    rows.ahead_stride = tile.ahead_stride;
    rows.gate_stride = tile.gate_stride;
    rows.h_prev = state.h[step % 2] + b * hidden_stride_ + tile.unit;
    rows.h_stride = slices * hidden_stride_;
    rows.next = shape_.proj_size ? state.raw + b * raw_stride_ + tile.unit : h_next;
    rows.next_stride = slices * (shape_.proj_size ? raw_stride_ : hidden_stride_);
    rows.output =
        shape_.proj_size ? nullptr : call_.output + row * output_stride_ + member.d * output_size_ + tile.unit;
    rows.output_stride = slices * output_stride_;
    if (kCell == Cell::kLstm) rows.c = state.c + b * hidden + tile.unit;
    if (kCell == Cell::kGru) rows.bias_hidden = state.bias_hidden + tile.unit;
    if (kSave && kCell != Cell::kRnn) rows.saved = direction.gates + row * saved_planes(kCell) * hidden + tile.unit;
    if (kSave && kCell == Cell::kLstm) rows.cells = direction.cells + row * hidden + tile.unit;
    rows.c_stride = slices * hidden;
    rows.saved_stride = saved_planes(kCell) * slices * hidden;
    if (tile.across)
      rows.h_stride = rows.next_stride = rows.output_stride = rows.c_stride = rows.saved_stride = rows.bias_stride =
          kLanes;
    if (tile.units == kLanes)
      run_rows<true, kSave>(rows);
    else
      run_rows<false, kSave>(rows);
  }

  template <bool kFull>
  RNNFAST_INLINE void store_hidden(const Member& member, int64_t step, int64_t row, int64_t b, int64_t column,
                                   int count, V h) {
    E* out = call_.output + row * output_stride_ + member.d * output_size_ + column;
    E* next = state_[member.d].h[(step + 1) % 2] + b * hidden_stride_ + column;
    store_part<kFull>(out, h, count);
    store_part<kFull>(next, h, count);
  }

  // h = W_hr (o * tanh(c)) for one block of projected columns.
  void proj_block(const Member& member, int64_t step, int64_t t, int64_t block, int64_t rows) {
    const State& state = state_[member.d];
    const DirectionWeights& weights = call_.direction[member.d].weights;
    const Operand<E> raw{state.raw + member.slice * raw_stride_, grid_.slices * raw_stride_};
    const PanelWidth width = proj_panels_.width(block);
    const E* const panel = panel_of(state.proj_panel, proj_panels_, block);
    V acc[kAccumulators];
    for_row_tiles(rows, tile_rows(width), [&](int64_t first, int count) {
      product(acc, proj_panels_, block, count, raw.from_row(first), panel, weights.hr);
      for (int m = 0; m < count; ++m) {
        const int64_t b = member.slice + (first + m) * grid_.slices, row = schedule_.offset[t] + b;
        for (int v = 0; v < width; ++v) {
          const int64_t column = (proj_panels_.first_vector(block) + v) * kLanes, left = shape_.proj_size - column;
          if (left >= kLanes)
            store_hidden<true>(member, step, row, b, column, kLanes, acc[m * width + v]);
          else
            store_hidden<false>(member, step, row, b, column, int(left), acc[m * width + v]);
        }
      }
    });
  }

  // h_n is each sequence's row of the output at its last step in running order; c has been updated in place.
  void store_final_states(int d) {
    const int64_t hidden = shape_.hidden_size;
    int64_t t = 0;
    for (int64_t b = schedule_.batch - 1; call_.direction[d].h_n && b >= 0; --b) {
      if (d == 0)
        while (t + 1 < schedule_.steps && schedule_.count[t + 1] > b) ++t;
      std::memcpy(call_.direction[d].h_n + b * output_size_,
                  call_.output + (schedule_.offset[t] + b) * output_stride_ + d * output_size_,
                  output_size_ * sizeof(E));
    }
    if (kCell == Cell::kLstm) {
      const C* c = state_[d].c;
      for (int64_t i = 0; i < schedule_.batch * hidden; ++i) narrow(c[i], call_.direction[d].c_n + i);
    }
  }

  const ForwardCall<E, C>& call_;
  const LayerShape& shape_;
  const Schedule& schedule_;
  const int64_t output_size_, output_stride_;
  const ForwardPlan plan_;
  const ThreadGrid grid_;
  const PanelShape<E> input_panels_, hidden_panels_, proj_panels_;
  Workspace workspace_;
  Barriers barriers_{};
  int64_t* start_ = nullptr;
  State state_[2];
  int64_t hidden_stride_ = 0, raw_stride_ = 0, chunk_rows_ = 0, ahead_stride_ = 0, ahead_size_ = 0;
  C* ahead_ = nullptr;
  E* panel_ = nullptr;
  int64_t block_size_ = 0;
};
