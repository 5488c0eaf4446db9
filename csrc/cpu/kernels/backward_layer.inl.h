// What backward of one layer works on: the call, the panels and the scratch memory.
// The work itself is in backward_prepare.inl.h, backward_step.inl.h, backward_sums.inl.h and backward.inl.h.
//
// Shapes     dgates [kept rows, grad_planes * H]: gradients of the pre-activations (docs/design/maths.md).
//            dproj [kept rows, P]: of the projected h. carry [B, H], updated in place: LSTM's dc, or GRU's share of dh
//            that bypasses the gates. bfloat16: dgates and dproj are bfloat16, each plane zero-padded to whole pairs;
//            all sums are float32.
// Ownership  As in forward: a worker has a slice of the batch and a part of the columns of dh.

template <class E, Cell kCell>
struct BackwardLayer {
  using C = ComputeOf<E>;
  using S = Simd<C>;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kPlanes = grad_planes(kCell), kGates = gate_count(kCell);
  // Rows of a stretch: two blocks of OuterSum for float32. Compared with a single stretch, training of RNN and LSTM H
  // 128, B 64 is 1.05 times faster, H 512 1.01-1.03; 256 and 1024 rows are no faster. bfloat16, 1024 rows: 1.03-1.06;
  // 2048 rows are no faster. (Zen 4)
  static constexpr int64_t kStretchRows = std::max<int64_t>(512, OuterSum<E>::kDepth);

  // The memory of one direction.
  struct Direction {
    E *hidden_panel, *proj_panel, *input_panel;
    E* dgates;           // [kept rows, kPlanes * plane]
    E* dproj;            // [kept rows, proj_stride]
    E* unprojected;      // [kept rows, H] o * tanh(c), for the gradient of W_hr
    const E** previous;  // [rows] h before each step
    C* carry;            // [B, H] the gradient of the state that a step hands to the one before it
  };

  // One thread at work on one direction.
  struct Worker {
    int d;
    GridPosition at;
    Barrier team;
    Retreat retreat;
  };

  explicit BackwardLayer(const BackwardCall<E, C>& call)
      : call(call),
        shape(call.shape),
        schedule(*call.schedule),
        hidden(shape.hidden_size),
        plane(whole_pairs<E>(hidden)),
        proj_stride(whole_pairs<E>(shape.proj_size)),
        output_size(shape.output_size()),
        output_stride(shape.directions * output_size),
        hidden_panels{output_size, kGates * plane},
        proj_panels{hidden, proj_stride},
        input_panels{shape.input_size, kGates * plane},
        stretches(schedule, shape.directions == 1 ? kStretchRows : schedule.total) {
    const double flops = 6. * schedule.total * shape.directions * shape.gate_rows() * (shape.input_size + output_size);
    quiet_grid = make_grid(call.threads, shape.directions, schedule.batch, hidden_panels.blocks(),
                           shape.gate_rows() * output_size * int64_t(sizeof(E)), flops, schedule.steps);
    grid = quiet_grid.now();
    workspace_.lay_out([&] { take_arrays(); });
  }

  Worker worker(int thread, int d) const {
    const GridPosition at = position_of(grid, thread);
    return {d, at, barriers.team(at), barriers.retreat_of(at)};
  }

  // Whether sequence b has a step before this one. In the reverse direction it may begin later than others.
  bool continues(int d, int64_t step, int64_t b) const {
    return step > 0 && b < schedule.count[time_of(schedule, d, step - 1)];
  }
  int64_t row_of(int d, int64_t step, int64_t b) const { return schedule.offset[time_of(schedule, d, step)] + b; }
  int64_t kept_row(int d, int64_t step, int64_t b) const { return stretches.kept(time_of(schedule, d, step)) + b; }
  int64_t rows_in(const Worker& worker, int64_t step) const {
    if (step < 0 || step >= schedule.steps) return 0;
    return rows_at(schedule, time_of(schedule, worker.d, step), worker.at.slice, grid.slices);
  }

  const BackwardCall<E, C>& call;
  const LayerShape shape;
  const Schedule schedule;
  const int64_t hidden, plane, proj_stride, output_size, output_stride;
  const PanelShape<E> hidden_panels, proj_panels, input_panels;
  Stretches stretches;
  // quiet_grid: as if no other program held the cores. Sums are cut by it, so contention changes no result.
  ThreadGrid quiet_grid, grid;
  Barriers barriers{};
  Direction direction[2];
  // Scratch memory of the gradients of weights, for each thread of quiet_grid.
  int64_t packed_size = 0, gate_sums_size = 0, proj_sums_size = 0;
  E* packed = nullptr;
  C *gate_sums = nullptr, *proj_sums = nullptr;

 private:
  void take_arrays() {
    barriers = make_barriers(grid, workspace_);
    stretches.take_arrays(workspace_);
    for (int d = 0; d < shape.directions; ++d) take_direction(direction[d]);
    // A part's units, of the gates and of the projection, and the weights that they belong to.
    const int64_t units = ceil_div(hidden, quiet_grid.per_direction()), columns = shape.input_size + output_size;
    const int64_t proj_units = ceil_div(shape.proj_size, quiet_grid.per_direction());
    packed_size = OuterSum<E>::packed_size(kPlanes, std::max(units, proj_units));
    gate_sums_size = OuterSum<E>::sums_size(kPlanes, units, kGates * units * columns, schedule.total);
    proj_sums_size = OuterSum<E>::sums_size(1, proj_units, proj_units * hidden, schedule.total);
    packed = workspace_.take<E>(quiet_grid.size() * packed_size);
    gate_sums = workspace_.take<C>(quiet_grid.size() * gate_sums_size);
    proj_sums = workspace_.take<C>(quiet_grid.size() * proj_sums_size);
  }

  void take_direction(Direction& own) {
    own.hidden_panel = workspace_.take<E>(hidden_panels.size());
    own.proj_panel = workspace_.take<E>(shape.proj_size ? proj_panels.size() : 0);
    own.input_panel = workspace_.take<E>(call.grad_input ? input_panels.size() : 0);
    const int64_t kept = stretches.kept_rows();
    own.dgates = workspace_.take<E>(kept * kPlanes * plane + TileSize::kMaxRows);  // OuterSum reads past the end
    own.dproj = workspace_.take<E>(kept * proj_stride + TileSize::kMaxRows);
    own.unprojected = workspace_.take<E>(shape.proj_size ? kept * hidden : 0);
    own.previous = workspace_.take<const E*>(schedule.total);
    own.carry = workspace_.take<C>(kCell == Cell::kRnn ? 0 : schedule.batch * hidden);
  }

  Workspace workspace_;
};
