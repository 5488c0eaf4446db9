// What forward of one layer works on: the call, its plan, the panels and the scratch memory. The work itself is in
// forward_prepare.inl.h, forward_step.inl.h and forward.inl.h.
//
// Shapes     input [rows, I], output [rows, D * Hout]. h lies in two buffers [B, Hout]: a step reads one and writes the
//            other. c lies in one [B, H] and is updated in place. bfloat16: rows of h are zero-padded to whole pairs.
// Ownership  A worker has a slice of the batch: the sequences slice, slice + slices, ..., so ragged batches stay
//            balanced. In it, the worker has a part of the units. Both stay the same at all steps.

template <class E, Cell kCell>
struct ForwardLayer {
  using C = ComputeOf<E>;
  using S = Simd<C>;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kGates = gate_count(kCell);

  // The memory of one direction.
  struct Direction {
    E *input_panel = nullptr, *hidden_panel = nullptr, *proj_panel = nullptr;  // null: the weight is read in place
    C* bias;         // in the order of a panel's columns: b_ih + b_hh, but b_ih alone for GRU's n
    C* bias_hidden;  // [H padded] GRU's b_hh of n
    E* h[2];         // [B, hidden_stride]
    C* c;            // [B, H]
    E* unprojected;  // [B, unprojected_stride] o * tanh(c), which the projection multiplies
  };

  // One thread at work on one direction.
  struct Worker {
    int d, slice, part;
    Range blocks;    // of units
    E* panel;        // InputProduct::kInPassing: one block of W_ih
    C* ahead;        // [rows of a chunk, ahead_stride] W_ih x + bias, of all units of the slice
    int64_t* start;  // [steps of a chunk + 1] first row in `ahead` of each time
    Barrier team;
    Retreat retreat;
  };

  ForwardLayer(const ForwardCall<E, C>& call, int threads, int64_t wave_steps)
      : call(call),
        shape(call.shape),
        schedule(*call.schedule),
        output_size(shape.output_size()),
        plan(make_plan(call, threads, wave_steps)),
        grid(plan.grid),
        input_panels{shape.hidden_size, shape.input_size, kGates, plan.input != InputProduct::kInPlace},
        hidden_panels{shape.hidden_size, output_size, kGates, plan.input != InputProduct::kInPlace},
        proj_panels{shape.proj_size, shape.hidden_size} {
    workspace_.lay_out([&] { take_arrays(); });
  }

  Worker worker(int thread, int d) const {
    const GridPosition at = position_of(grid, thread);
    return {d,
            at.slice,
            at.part,
            part_of(hidden_panels.blocks(), at.part, grid.unit_parts),
            panel_ + thread * block_size_,
            ahead_ + (at.direction * grid.slices + at.slice) * ahead_size_,
            start_ + thread * (schedule.steps + 1),
            barriers.team(at),
            barriers.retreat_of(at)};
  }

  static const E* panel_of(const E* panels, const PanelShape<E>& shape, int64_t block) {
    return panels ? panels + shape.offset(block) : nullptr;
  }

  const ForwardCall<E, C>& call;
  const LayerShape shape;
  const Schedule schedule;
  const int64_t output_size;
  const ForwardPlan plan;
  const ThreadGrid grid;
  const PanelShape<E> input_panels, hidden_panels, proj_panels;
  Barriers barriers{};
  Direction direction[2];
  int64_t hidden_stride = 0, unprojected_stride = 0, ahead_stride = 0;
  int64_t chunk_rows = 0;  // a chunk grows by whole steps until it has so many rows of a slice

 private:
  void take_arrays() {
    barriers = make_barriers(grid, workspace_);
    start_ = workspace_.take<int64_t>((schedule.steps + 1) * grid.size());
    hidden_stride = hidden_panels.padded_depth();
    unprojected_stride = proj_panels.padded_depth();
    for (int d = 0; d < shape.directions; ++d) take_direction(direction[d]);
    take_ahead();
  }

  void take_direction(Direction& own) {
    if (plan.input != InputProduct::kInPlace) {
      if (plan.input != InputProduct::kInPassing) own.input_panel = workspace_.take<E>(input_panels.size());
      own.hidden_panel = workspace_.take<E>(hidden_panels.size());
      if (shape.proj_size) own.proj_panel = workspace_.take<E>(proj_panels.size());
    }
    own.bias = workspace_.take<C>(hidden_panels.position(hidden_panels.blocks()) + kLanes);
    own.bias_hidden = workspace_.take<C>(kCell == Cell::kGru ? padded_units() : 0);
    for (E*& h : own.h) h = workspace_.take<E>(schedule.batch * hidden_stride);
    own.c = workspace_.take<C>(kCell == Cell::kLstm ? schedule.batch * shape.hidden_size : 0);
    own.unprojected = workspace_.take<E>(shape.proj_size ? schedule.batch * unprojected_stride : 0);
  }

  void take_ahead() {
    const int64_t blocks = ceil_div(hidden_panels.blocks(), plan.quiet_unit_parts);
    const int64_t columns = std::min(blocks * TileSize::kMaxVectors * kLanes, padded_units() * kGates);
    const int64_t step_rows = ceil_div(schedule.batch, grid.slices);
    chunk_rows = plan.wave_steps
                     ? plan.wave_steps * schedule.batch
                     : std::max<int64_t>(kChunkBytes / (columns * sizeof(C)), kChunkTiles * TileSize::kMaxRows);
    if (plan.input == InputProduct::kInPassing) {
      chunk_rows = schedule.total;
      block_size_ = TileSize::kMaxVectors * kLanes * input_panels.padded_depth();
      panel_ = workspace_.take<E>(block_size_ * grid.size());
    }
    ahead_stride = hidden_panels.position(hidden_panels.blocks());
    ahead_size_ = std::min(chunk_rows + step_rows, schedule.steps * step_rows) * ahead_stride;
    // Dense blocks are read past their end.
    ahead_ = workspace_.take<C>(ahead_size_ * grid.directions * grid.slices + kLanes);
  }

  int64_t padded_units() const { return hidden_panels.column_vectors() * kLanes; }

  Workspace workspace_;
  int64_t* start_ = nullptr;
  int64_t ahead_size_ = 0, block_size_ = 0;
  C* ahead_ = nullptr;
  E* panel_ = nullptr;
};
