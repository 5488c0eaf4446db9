// Forward of one layer: every time step of both directions, inside one parallel region.
//
// Shapes     As in forward_layer.inl.h.
// Ownership  A worker computes W_ih x of its own units and rows, a chunk of steps ahead, which needs no barrier. Then
//            it runs the steps of that chunk. Under contention one worker of a team goes on alone (threads.h, Retreat).
// Sync       One barrier of the team per step, two with a whole-row epilogue (forward_step.inl.h).
// Limits     Weights are packed at every call and streamed from cache at every step. Few rows read them in place.

template <class E, Cell kCell>
class LayerForward {
  using Layer = ForwardLayer<E, kCell>;
  using Worker = typename Layer::Worker;
  using C = typename Layer::C;
  using S = typename Layer::S;
  using V = typename S::V;
  static constexpr int kLanes = Layer::kLanes;

 public:
  // wave_steps: the steps of a chunk of a wavefront, which one thread at a time computes. 0: the layer is in none.
  LayerForward(const ForwardCall<E, C>& call, int threads, int64_t wave_steps = 0)
      : layer_(call, threads, wave_steps), preparation_(layer_), step_(layer_) {}

  // False if the threads could not be had: then nothing was done.
  bool run() {
    if (!run_threads(layer_.grid.size(), [&](int thread) { run_thread(thread); })) return false;
    for (int d = 0; d < layer_.shape.directions; ++d) store_final_states(d);
    return true;
  }

  // The same in parts, for a wavefront: prepare_wave(), then every chunk in turn.
  void prepare_wave() { preparation_.run(layer_.worker(0, 0)); }
  void run_chunk_of_wave(int64_t chunk) {
    Worker worker = layer_.worker(0, 0);
    const int64_t first = chunk * layer_.plan.wave_steps;
    const int64_t end = std::min(first + layer_.plan.wave_steps, layer_.schedule.steps);
    run_chunk(worker, first, end);
    if (end == layer_.schedule.steps) store_final_states(0);
  }

 private:
  void run_thread(int thread) {
    const GridPosition at = position_of(layer_.grid, thread);
    for (int d = 0; d < layer_.shape.directions; ++d) {
      if (layer_.grid.directions == 2 && d != at.direction) continue;
      const Worker worker = layer_.worker(thread, d);
      preparation_.run(worker);
      layer_.barriers.direction(at).wait(at.rank);
      run_steps(worker);
    }
  }

  void run_steps(Worker worker) const {
    for (int64_t step = 0, end; step < layer_.schedule.steps; step = end) {
      end = end_of_chunk(worker, step);
      if (!run_chunk(worker, step, end)) return;
    }
  }

  // The step after the chunk that begins with `step`.
  int64_t end_of_chunk(const Worker& worker, int64_t step) const {
    const Schedule& schedule = layer_.schedule;
    if (layer_.plan.input == InputProduct::kAtStep) return schedule.steps;
    for (int64_t rows = 0; step < schedule.steps && rows < layer_.chunk_rows; ++step)
      rows += rows_at(schedule, time_of(schedule, worker.d, step), worker.slice, layer_.grid.slices);
    return step;
  }

  // Steps [step, end). False if another worker of the team does the rest of them alone.
  bool run_chunk(Worker& worker, int64_t step, int64_t end) const {
    const Schedule& schedule = layer_.schedule;
    const int64_t low = std::min(time_of(schedule, worker.d, step), time_of(schedule, worker.d, end - 1));
    int64_t* const start = worker.start;
    start[0] = 0;
    for (int64_t i = 0; i < end - step; ++i)
      start[i + 1] = start[i] + rows_at(schedule, low + i, worker.slice, layer_.grid.slices);
    const bool at_step = layer_.plan.input == InputProduct::kAtStep;
    if (!takes_part(worker, step)) return false;
    if (!at_step) multiply_input(worker, low, end - step);
    for (; step < end; ++step) {
      if (!takes_part(worker, step)) return false;
      const int64_t t = time_of(schedule, worker.d, step), i = t - low;
      step_.run(worker, step, t, at_step ? nullptr : worker.ahead + start[i] * layer_.ahead_stride,
                start[i + 1] - start[i]);
    }
    return true;
  }

  // False if the worker of part 0 does the other steps without this one. It finds `ahead` of this chunk complete,
  // because every worker has done its part already.
  bool takes_part(Worker& worker, int64_t step) const {
    if (layer_.grid.unit_parts == 1 || !worker.retreat.alone(step, worker.part)) return true;
    worker.blocks = {0, layer_.hidden_panels.blocks()};
    worker.team = Barrier(nullptr, 1);
    return worker.part == 0;
  }

  // ahead = W_ih x + bias, for this worker's units and rows at `times` times from `low` on.
  void multiply_input(const Worker& worker, int64_t low, int64_t times) const {
    const ForwardCall<E, C>& call = layer_.call;
    const PanelShape<E>& panels = layer_.input_panels;
    const int64_t products = layer_.plan.even_rows ? 1 : times, times_each = layer_.plan.even_rows ? times : 1;
    const Weight& weight = call.direction[worker.d].weights.ih;
    for (int64_t block = worker.blocks.first; block < worker.blocks.last; ++block) {
      const E* panel = Layer::panel_of(layer_.direction[worker.d].input_panel, panels, block);
      if (layer_.plan.input == InputProduct::kInPassing) {
        pack_panels(worker.panel - panels.offset(block), panels, weight, block, block + 1);
        panel = worker.panel;
      }
      for (int64_t i = 0; i < products; ++i) {
        const Operand<E> x{call.input + (layer_.schedule.offset[low + i] + worker.slice) * call.input_stride,
                           layer_.grid.slices * call.input_stride};
        const int64_t rows = worker.start[i + times_each] - worker.start[i];
        C* out = worker.ahead + worker.start[i] * layer_.ahead_stride + panels.position(block);
        multiply_input_block(worker, block, panel, x, rows, out);
      }
    }
  }

  void multiply_input_block(const Worker& worker, int64_t block, const E* panel, Operand<E> x, int64_t rows,
                            C* out) const {
    const PanelShape<E>& panels = layer_.input_panels;
    const int64_t stride = layer_.ahead_stride;
    const PanelWidth width = panels.width(block);
    const C* bias = layer_.direction[worker.d].bias + panels.position(block);
    V acc[TileSize::kAccumulators];
    for_row_tiles(rows, TileSize::rows(width), [&](int64_t first, int count) {
      multiply_block(acc, panels, block, count, x.from_row(first), panel, layer_.call.direction[worker.d].weights.ih);
      for (int m = 0; m < count; ++m)
        for (int v = 0; v < width; ++v)
          S::store(out + (first + m) * stride + v * kLanes, acc[m * width + v] + S::load(bias + v * kLanes));
    });
  }

  // h_n is each sequence's row of the output at its last step. c has been updated in place.
  void store_final_states(int d) const {
    const ForwardDirection<E, C>& direction = layer_.call.direction[d];
    const Schedule& schedule = layer_.schedule;
    const int64_t output_size = layer_.output_size;
    int64_t t = 0;
    for (int64_t b = schedule.batch - 1; direction.h_n && b >= 0; --b) {
      if (d == 0)
        while (t + 1 < schedule.steps && schedule.count[t + 1] > b) ++t;
      std::memcpy(direction.h_n + b * output_size,
                  layer_.call.output + (schedule.offset[t] + b) * layer_.call.output_stride + d * output_size,
                  output_size * sizeof(E));
    }
    if (kCell == Cell::kLstm) {
      const C* c = layer_.direction[d].c;
      for (int64_t i = 0; i < schedule.batch * layer_.shape.hidden_size; ++i) narrow(c[i], direction.c_n + i);
    }
  }

  Layer layer_;
  const ForwardPreparation<E, kCell> preparation_;
  const ForwardStep<E, kCell> step_;
};
