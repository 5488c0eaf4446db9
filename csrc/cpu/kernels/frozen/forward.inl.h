// Forward of one frozen layer: weights packed once, activations in the format of the weights, gates and c in float32.
//
// Shapes     input [rows, I], output [rows, D * Hout]; h in two buffers [B, Hout], c in one [B, H], all float32
// Ownership  As forward.inl.h: a thread owns a slice of the batch and a part of the hidden units.
// One step   h in the format of the weights -> W_hh h, block by block -> activations of the block -> h, c, output
// Sync       One barrier per step among the threads of a slice, two with a projection; none if a slice has one thread.
//            Every thread of a slice converts all of the slice's h for itself, which saves a second barrier.
// Saved      Nothing: there is no backward.
// Limits     int8: 65,535 columns (31 bits of a sum).

// A chunk of W_ih x stays in L2 beside the weights.
constexpr int64_t kFrozenChunkBytes = 256 * 1024;
constexpr int64_t kFrozenChunkRows = 32;

// How much faster than float32 a format multiplies where the machine has instructions for it.
template <class F>
constexpr double kFrozenRate = F::kFormat == WeightFormat::kInt8 ? 4
                               : F::kBytes == 2                  ? 2
                                                                 : 1;

template <class F, Cell kCell>
class FrozenForward {
  using S = Simd<float>;
  static constexpr int kGates = gate_count(kCell);

 public:
  FrozenForward(const FrozenCall& call, int threads)
      : call_(call),
        shape_(call.shape),
        schedule_(*call.schedule),
        output_size_(shape_.output_size()),
        wide_(call.wide_activations && F::kFormat == WeightFormat::kInt8),
        input_(call.direction[0].ih.shape),
        hidden_(call.direction[0].hh.shape),
        proj_(call.direction[0].hr.shape),
        grid_(choose_grid(threads)) {
    workspace_.lay_out([&] { take_arrays(); });
  }

  // False, with nothing done, if the threads could not be had.
  bool run() {
    return run_threads(grid_.size(), [&](int thread) { run_thread(thread); });
  }

 private:
  struct State {
    float* h[2];         // [B, Hout]
    float* c;            // [B, H]
    float* unprojected;  // [B, H] o * tanh(c), what a projection multiplies
  };

  // Rows of one operand in the form of the weights' format.
  struct Operand {
    char* data;
    int64_t plane_bytes, row_bytes;
    RowScale* scale;
    ActivationRows from(int64_t row) const { return {data + row * row_bytes, row_bytes, plane_bytes, scale + row}; }
  };

  // One thread's share of one direction.
  struct Worker {
    int d, slice, part;
    Range blocks;  // of W_ih and W_hh
    Operand x, h;
    float* ahead;    // [rows of a chunk, ahead_stride_] W_ih x + bias, of all units of the slice
    float* sums;     // W_hh h of the tiles that are being finished
    int64_t* start;  // [steps of a chunk + 1] first row in `ahead` of each time
    Barrier barrier;
    Retreat retreat;
  };

  ThreadGrid choose_grid(int threads) const {
    const double flops = 2. * schedule_.total * shape_.directions * shape_.gate_rows() *
                         (shape_.input_size + shape_.output_size()) / kFrozenRate<F>;
    return make_grid(threads, shape_.directions, schedule_.batch, hidden_.blocks(), hidden_.panel_bytes(), flops,
                     schedule_.steps)
        .now();
  }

  Operand take_operand(int64_t depth, int64_t rows) {
    const int64_t bytes = activation_bytes<F>(depth, wide_);
    return {workspace_.take<char>(bytes * rows), wide_ ? bytes / 2 : bytes, bytes, workspace_.take<RowScale>(rows)};
  }

  void take_arrays() {
    barriers_ = make_barriers(grid_, workspace_);
    for (int d = 0; d < shape_.directions; ++d) {
      for (float*& h : state_[d].h) h = workspace_.take<float>(schedule_.batch * output_size_);
      state_[d].c = workspace_.take<float>(kCell == Cell::kLstm ? schedule_.batch * shape_.hidden_size : 0);
      state_[d].unprojected = workspace_.take<float>(shape_.proj_size ? schedule_.batch * shape_.hidden_size : 0);
    }
    const int64_t slice_rows = ceil_div(schedule_.batch, grid_.slices);
    ahead_stride_ = hidden_.vectors() * kPackedLanes;
    const int64_t rows =
        std::max<int64_t>(kFrozenChunkBytes / (ahead_stride_ * int64_t(sizeof(float))), kFrozenChunkRows);
    chunk_steps_ = std::clamp<int64_t>(ceil_div(rows, slice_rows), 1, schedule_.steps);
    ahead_size_ = chunk_steps_ * slice_rows * ahead_stride_;
    ahead_ = workspace_.take<float>(ahead_size_ * grid_.directions * grid_.slices);
    const int64_t hidden_depth = std::max(output_size_, shape_.proj_size ? shape_.hidden_size : 0);
    memory_ = workspace_.take<Memory>(grid_.size());
    for (int thread = 0; thread < grid_.size(); ++thread) {
      const Memory own{take_operand(shape_.input_size, chunk_steps_ * slice_rows),
                       take_operand(hidden_depth, slice_rows), workspace_.take<float>(kSumsSize),
                       workspace_.take<int64_t>(chunk_steps_ + 1)};
      if (memory_) memory_[thread] = own;
    }
  }

  void run_thread(int thread) {
    const GridPosition at = position_of(grid_, thread);
    for (int d = 0; d < shape_.directions; ++d) {
      if (grid_.directions == 2 && d != at.direction) continue;
      const Memory& own = memory_[thread];
      Worker worker{d,
                    at.slice,
                    at.part,
                    part_of(hidden_.blocks(), at.part, grid_.unit_parts),
                    own.x,
                    own.h,
                    ahead_ + (at.direction * grid_.slices + at.slice) * ahead_size_,
                    own.sums,
                    own.start,
                    barriers_.team(at),
                    barriers_.retreat_of(at)};
      prepare(worker);
      barriers_.direction(at).wait(at.rank);
      run_steps(worker);
      barriers_.direction(at).wait(at.rank);
      if (at.rank == 0) store_final_states(d);
    }
  }

  // The initial states of this thread's rows.
  void prepare(const Worker& worker) {
    const FrozenDirection& direction = call_.direction[worker.d];
    State& state = state_[worker.d];
    const auto set = [&](float* to, const float* from, int64_t b, int64_t size) {
      if (from)
        std::memcpy(to + b * size, from + b * size, size_t(size) * sizeof(float));
      else
        std::memset(to + b * size, 0, size_t(size) * sizeof(float));
    };
    for (int64_t b = worker.slice; b < schedule_.batch; b += grid_.slices) {
      if (b / grid_.slices % grid_.unit_parts != worker.part) continue;
      for (float* h : state.h) set(h, direction.hx, b, output_size_);
      if (kCell == Cell::kLstm) set(state.c, direction.cx, b, shape_.hidden_size);
    }
  }

  void run_steps(Worker& worker) {
    for (int64_t step = 0, end; step < schedule_.steps; step = end) {
      end = std::min(step + chunk_steps_, schedule_.steps);
      const int64_t low = std::min(time_of(schedule_, worker.d, step), time_of(schedule_, worker.d, end - 1));
      worker.start[0] = 0;
      for (int64_t i = 0; i < end - step; ++i)
        worker.start[i + 1] = worker.start[i] + rows_at(schedule_, low + i, worker.slice, grid_.slices);
      if (!takes_part(worker, step)) return;
      project_input(worker, low, end - step);
      for (; step < end; ++step) {
        if (!takes_part(worker, step)) return;
        const int64_t t = time_of(schedule_, worker.d, step), i = t - low;
        run_step(worker, step, t, worker.ahead + worker.start[i] * ahead_stride_,
                 worker.start[i + 1] - worker.start[i]);
      }
    }
  }

  // False if unit 0 does the rest of the steps without this thread, whose part of `ahead` is there already.
  bool takes_part(Worker& worker, int64_t step) const {
    if (grid_.unit_parts == 1 || !worker.retreat.alone(step, worker.part)) return true;
    worker.blocks = {0, hidden_.blocks()};
    worker.barrier = Barrier(nullptr, 1);
    return worker.part == 0;
  }

  // ahead = W_ih x + bias for `times` time steps from `low` on, this thread's units and rows.
  void project_input(const Worker& worker, int64_t low, int64_t times) {
    const FrozenDirection& direction = call_.direction[worker.d];
    const int64_t size = shape_.input_size;
    int64_t rows = 0;
    for (int64_t i = 0; i < times; ++i)
      for (int64_t j = worker.start[i]; j < worker.start[i + 1]; ++j, ++rows) {
        const int64_t row = schedule_.offset[low + i] + worker.slice + (j - worker.start[i]) * grid_.slices;
        convert<false>(worker.x, rows, call_.input + row * size, size);
      }
    for (int64_t block = worker.blocks.first; block < worker.blocks.last; ++block) {
      const int64_t position = input_.position(block) * kPackedLanes;
      const int64_t columns = input_.width(block) * kPackedLanes;
      float* const out = worker.ahead + position;
      frozen_block<F>(rows, out, ahead_stride_, direction.ih, block, worker.x.from(0), wide_);
      for (int64_t m = 0; m < rows; ++m)
        for (int64_t v = 0; v < columns; v += S::kLanes) {
          float* const at = out + m * ahead_stride_ + v;
          S::store(at, S::load(at) + S::load(direction.bias + position + v));
        }
    }
  }

  template <bool kSymmetric>
  void convert(const Operand& operand, int64_t row, const float* from, int64_t size) const {
    char* const to = operand.data + row * operand.row_bytes;
    // What stands behind the row's end meets weights of zero, but must be finite.
    const int64_t tail = size * F::kBytes / 64 * 64;
    for (int64_t plane = 0; plane < operand.row_bytes; plane += operand.plane_bytes)
      std::memset(to + plane + tail, 0, size_t(operand.plane_bytes - tail));
    operand.scale[row] = prepare_row<F, kSymmetric>(from, size, to, operand.plane_bytes, wide_);
  }

  void run_step(const Worker& worker, int64_t step, int64_t t, const float* ahead, int64_t rows) {
    const State& state = state_[worker.d];
    const bool from_zero = step == 0 && !call_.direction[worker.d].hx;
    const auto row_of = [&](int64_t j) { return worker.slice + j * grid_.slices; };
    if (!from_zero)
      for (int64_t j = 0; j < rows; ++j)
        convert<true>(worker.h, j, state.h[step % 2] + row_of(j) * output_size_, output_size_);
    if (rows > 0 && rows <= kFewRows)
      step_few_rows(worker, step, t, ahead, int(rows), from_zero);
    else
      for (int64_t block = worker.blocks.first; block < worker.blocks.last; ++block)
        step_block(worker, step, t, block, ahead + hidden_.position(block) * kPackedLanes, rows, from_zero);
    if (shape_.proj_size) {
      worker.barrier.wait(worker.part);
      for (int64_t j = 0; j < rows; ++j)
        convert<false>(worker.h, j, state.unprojected + row_of(j) * shape_.hidden_size, shape_.hidden_size);
      const Range blocks = part_of(proj_.blocks(), worker.part, worker.barrier.size());
      for (int64_t block = blocks.first; block < blocks.last; ++block) proj_block(worker, step, t, block, rows);
    }
    worker.barrier.wait(worker.part);
  }

  // Room for W_hh h of several blocks of few rows, or of several tiles of one block.
  static constexpr int64_t kFewBlocks = 4;
  static constexpr int64_t kManyRows = 16;
  static constexpr int64_t kSumsSize =
      std::max(kFewBlocks * kFewRows, kManyRows) * PackedShape::kMostVectors * kPackedLanes;

  // W_hh h of one block; zeros where h is.
  void multiply_hidden(const Worker& worker, int64_t block, ActivationRows h, int64_t rows, float* out, int64_t stride,
                       bool from_zero) const {
    if (!from_zero) return frozen_block<F>(rows, out, stride, call_.direction[worker.d].hh, block, h, wide_);
    for (int64_t m = 0; m < rows; ++m)
      std::memset(out + m * stride, 0, size_t(hidden_.width(block)) * kPackedLanes * sizeof(float));
  }

  // Several blocks, then the activations of all their units, row by row: their chains of exponentials overlap. Every
  // second step begins with the last block, which is still in the cache.
  void step_few_rows(const Worker& worker, int64_t step, int64_t t, const float* ahead, int rows, bool from_zero) {
    const int64_t blocks = worker.blocks.last - worker.blocks.first, groups = ceil_div(blocks, kFewBlocks);
    for (int64_t i = 0; i < groups; ++i) {
      const Range group = part_of(blocks, step % 2 ? groups - 1 - i : i, groups);
      const int64_t first = worker.blocks.first + group.first, last = worker.blocks.first + group.last;
      const int64_t position = hidden_.position(first), width = hidden_.position(last) - position;
      for (int64_t block = first; block < last; ++block)
        multiply_hidden(worker, block, worker.h.from(0), rows,
                        worker.sums + (hidden_.position(block) - position) * kPackedLanes, width * kPackedLanes,
                        from_zero);
      const int64_t unit = hidden_.first_unit_vector(first) * kPackedLanes;
      const int64_t units = std::min(hidden_.first_unit_vector(last) * kPackedLanes, shape_.hidden_size) - unit;
      const int64_t whole = units / kPackedLanes, rest = units % kPackedLanes;
      for (int row = 0; row < rows; ++row) {
        const float* const sums = worker.sums + row * width * kPackedLanes;
        const float* const own = ahead + row * ahead_stride_ + position * kPackedLanes;
        for (int part = 0; part < kFrozenParts && whole > 0; ++part)
          finish(worker, step, t,
                 {row, int(whole), unit + part * S::kLanes, S::kLanes, sums + part * S::kLanes, kGates * kPackedLanes,
                  own + part * S::kLanes, kGates * kPackedLanes, true});
      }
      if (rest > 0)
        finish_vector(worker, step, t, 0, rows, unit + whole * kPackedLanes, int(rest),
                      worker.sums + whole * kGates * kPackedLanes, width * kPackedLanes,
                      ahead + (position + whole * kGates) * kPackedLanes);
    }
  }

  void step_block(const Worker& worker, int64_t step, int64_t t, int64_t block, const float* ahead, int64_t rows,
                  bool from_zero) {
    const int64_t width = hidden_.width(block) * kPackedLanes;
    const int64_t vectors = hidden_.first_unit_vector(block + 1) - hidden_.first_unit_vector(block);
    for_row_tiles(rows, int(kManyRows), [&](int64_t first, int count) {
      multiply_hidden(worker, block, worker.h.from(first), count, worker.sums, width, from_zero);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t unit = (hidden_.first_unit_vector(block) + v) * kPackedLanes;
        finish_vector(worker, step, t, first, count, unit, int(std::min(kPackedLanes, shape_.hidden_size - unit)),
                      worker.sums + v * kPackedLanes, width, ahead + first * ahead_stride_ + v * kPackedLanes);
      }
    });
  }

  // `units` of one vector of 16 units, for `rows` rows from `first` on.
  void finish_vector(const Worker& worker, int64_t step, int64_t t, int64_t first, int rows, int64_t unit, int units,
                     const float* sums, int64_t stride, const float* ahead) {
    for (int at = 0; at < units; at += S::kLanes)
      finish(worker, step, t,
             {first, rows, unit + at, std::min(units - at, S::kLanes), sums + at, stride, ahead + at, ahead_stride_,
              false});
  }

  // `rows` rows of one vector of units; `across`: that many vectors of one row, 16 units from one to the next.
  struct Strip {
    int64_t first_row;  // among the slice's rows of this time
    int rows;
    int64_t unit;
    int units;
    const float* sums;  // [rows, sums_stride] W_hh h
    int64_t sums_stride;
    const float* ahead;  // [rows, ahead_stride] W_ih x + bias
    int64_t ahead_stride;
    bool across;
  };

  void finish(const Worker& worker, int64_t step, int64_t t, const Strip& strip) {
    const State& state = state_[worker.d];
    const int64_t hidden = shape_.hidden_size, slices = grid_.slices;
    const int64_t b = worker.slice + strip.first_row * slices, row = schedule_.offset[t] + b;
    const int64_t output_stride = shape_.directions * output_size_;
    CellRows<float, kCell> rows;
    rows.rows = strip.rows;
    rows.units = strip.units;
    rows.relu = shape_.relu;
    rows.hidden = hidden;
    rows.gates = strip.sums;
    rows.gates_stride = strip.sums_stride;
    rows.ahead = strip.ahead;
    rows.ahead_stride = strip.ahead_stride;
    rows.gate_stride = kPackedLanes;
    rows.h_prev = state.h[step % 2] + b * output_size_ + strip.unit;
    rows.h_stride = slices * output_size_;
    rows.next = shape_.proj_size ? state.unprojected + b * hidden + strip.unit
                                 : state.h[(step + 1) % 2] + b * output_size_ + strip.unit;
    rows.next_stride = slices * (shape_.proj_size ? hidden : output_size_);
    rows.output =
        shape_.proj_size ? nullptr : call_.output + row * output_stride + worker.d * output_size_ + strip.unit;
    rows.output_stride = slices * output_stride;
    if (kCell == Cell::kLstm) rows.c = state.c + b * hidden + strip.unit;
    if (kCell == Cell::kGru) rows.bias_hidden = call_.direction[worker.d].bias_hidden + strip.unit;
    rows.c_stride = slices * hidden;
    rows.saved_stride = 0;
    if (strip.across)
      rows.h_stride = rows.next_stride = rows.output_stride = rows.c_stride = rows.bias_stride = kPackedLanes;
    if (strip.units == S::kLanes)
      run_rows<true, false>(rows);
    else
      run_rows<false, false>(rows);
  }

  // h = W_hr (o * tanh(c)) for one block of projected columns.
  void proj_block(const Worker& worker, int64_t step, int64_t t, int64_t block, int64_t rows) {
    const int64_t first = proj_.first_unit_vector(block) * kPackedLanes;
    const int64_t width = proj_.width(block) * kPackedLanes, columns = std::min(width, shape_.proj_size - first);
    const int64_t output_stride = shape_.directions * output_size_;
    for_row_tiles(rows, int(kManyRows), [&](int64_t at, int count) {
      frozen_block<F>(count, worker.sums, width, call_.direction[worker.d].hr, block, worker.h.from(at), wide_);
      for (int m = 0; m < count; ++m) {
        const int64_t b = worker.slice + (at + m) * grid_.slices, row = schedule_.offset[t] + b;
        const size_t bytes = size_t(columns) * sizeof(float);
        std::memcpy(state_[worker.d].h[(step + 1) % 2] + b * output_size_ + first, worker.sums + m * width, bytes);
        std::memcpy(call_.output + row * output_stride + worker.d * output_size_ + first, worker.sums + m * width,
                    bytes);
      }
    });
  }

  // h_n is each sequence's row of the output at its last step in running order; c has been updated in place.
  void store_final_states(int d) const {
    const FrozenDirection& direction = call_.direction[d];
    const int64_t output_stride = shape_.directions * output_size_;
    int64_t t = 0;
    for (int64_t b = schedule_.batch - 1; b >= 0; --b) {
      if (d == 0)
        while (t + 1 < schedule_.steps && schedule_.count[t + 1] > b) ++t;
      std::memcpy(direction.h_n + b * output_size_,
                  call_.output + (schedule_.offset[t] + b) * output_stride + d * output_size_,
                  size_t(output_size_) * sizeof(float));
    }
    if (kCell == Cell::kLstm)
      std::memcpy(direction.c_n, state_[d].c, size_t(schedule_.batch * shape_.hidden_size) * sizeof(float));
  }

  struct Memory {
    Operand x, h;
    float* sums;
    int64_t* start;
  };

  const FrozenCall& call_;
  const LayerShape& shape_;
  const Schedule& schedule_;
  const int64_t output_size_;
  const bool wide_;
  const PackedShape input_, hidden_, proj_;
  const ThreadGrid grid_;
  Workspace workspace_;
  Barriers barriers_{};
  State state_[2];
  int64_t ahead_stride_ = 0, ahead_size_ = 0, chunk_steps_ = 0;
  float* ahead_ = nullptr;
  Memory* memory_ = nullptr;  // [threads]
};

template <class F, Cell kCell>
void run_frozen_cell(const FrozenCall* layers, int64_t count) {
  for (int64_t k = 0; k < count; ++k)
    if (!FrozenForward<F, kCell>(layers[k], layers[k].threads).run()) FrozenForward<F, kCell>(layers[k], 1).run();
}

template <class F>
void run_frozen(const FrozenCall* layers, int64_t count) {
  switch (layers->shape.cell) {
    case Cell::kRnn:
      return run_frozen_cell<F, Cell::kRnn>(layers, count);
    case Cell::kGru:
      return run_frozen_cell<F, Cell::kGru>(layers, count);
    case Cell::kLstm:
      return run_frozen_cell<F, Cell::kLstm>(layers, count);
  }
}
