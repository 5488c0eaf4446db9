// Backward of one layer: back through time, and the gradients of weights and input, in one parallel region.
//
// Shapes     As in backward_layer.inl.h.
// Stretches  Time is walked in stretches of steps (stretches.h). The sums of a stretch follow at once, while its gate
//            gradients are still in cache. The next stretch uses the same memory. Two directions are one stretch,
//            because dx is the sum of both and is rounded once.
// Sync       One barrier of the team per step, two with a projection. Around the sums of a stretch: one barrier of the
//            threads of a direction before and one after.
// Limits     No atomics, and a fixed order of every sum. So results repeat bit for bit at a given number of threads.

template <class E, Cell kCell>
class LayerBackward {
  using Layer = BackwardLayer<E, kCell>;
  using Worker = typename Layer::Worker;

 public:
  explicit LayerBackward(const BackwardCall<E, ComputeOf<E>>& call)
      : layer_(call), preparation_(layer_), step_(layer_), sums_(layer_) {}

  // False if the threads could not be had: then nothing was done.
  bool run() {
    return run_threads(layer_.grid.size(), [&](int thread) { run_thread(thread); });
  }

 private:
  void run_thread(int thread) const {
    const GridPosition at = position_of(layer_.grid, thread);
    const int directions = int(layer_.shape.directions);
    for (int d = 0; d < directions; ++d) {
      if (layer_.grid.directions == 2 && d != at.direction) continue;
      run_direction(layer_.worker(thread, d), thread);
    }
    if (!layer_.call.grad_input || directions == 1) return;
    layer_.barriers.all().wait(thread);
    sums_.input(thread, 0);
  }

  void run_direction(const Worker& worker, int thread) const {
    const BackwardDirection<E, ComputeOf<E>>& direction = layer_.call.direction[worker.d];
    const Barrier barrier = layer_.barriers.direction(worker.at);
    const int rank = worker.at.rank, parts = layer_.quiet_grid.per_direction();
    preparation_.run(worker);
    barrier.wait(rank);
    for (int64_t stretch = layer_.stretches.count() - 1; stretch >= 0; --stretch) {
      run_steps(worker, stretch);
      barrier.wait(rank);
      for (int part = rank; part < parts && direction.grad_weight_ih; part += layer_.grid.per_direction())
        sums_.add_weights(worker, part, stretch);
      if (layer_.call.grad_input && layer_.shape.directions == 1) sums_.input(thread, stretch);
      if (stretch > 0) barrier.wait(rank);
    }
    if (direction.grad_cx) store_grad_cx(worker);
  }

  void run_steps(Worker worker, int64_t stretch) const {
    const Range steps = layer_.stretches.steps(stretch);
    for (int64_t step = steps.last - 1; step >= steps.first; --step) {
      if (layer_.grid.unit_parts > 1 && worker.retreat.alone(layer_.schedule.steps - 1 - step, worker.at.part)) {
        if (worker.at.part != 0) return;
        worker.team = Barrier(nullptr, 1);
      }
      step_.run(worker, step);
    }
    if (stretch == 0 && layer_.call.direction[worker.d].grad_hx) step_.first_state(worker);
  }

  // The first steps have left the gradient of cx in `carry`.
  void store_grad_cx(const Worker& worker) const {
    const int64_t hidden = layer_.hidden;
    for (int64_t b = worker.at.rank; b < layer_.schedule.batch; b += layer_.grid.per_direction())
      for (int64_t i = b * hidden; i < (b + 1) * hidden; ++i)
        narrow(layer_.direction[worker.d].carry[i], layer_.call.direction[worker.d].grad_cx + i);
  }

  const Layer layer_;
  const BackwardPreparation<E, kCell> preparation_;
  const BackwardStep<E, kCell> step_;
  const BackwardSums<E, kCell> sums_;
};

template <class E, Cell kCell>
bool try_backward(const BackwardCall<E, ComputeOf<E>>& call) {
  if constexpr (std::is_same_v<E, ComputeOf<E>>) {
    if (StepBackward<E, kCell>::takes(call)) return StepBackward<E, kCell>(call).run();
  }
  return LayerBackward<E, kCell>(call).run();
}

template <class E, Cell kCell>
void backward_layer_of(const BackwardCall<E, ComputeOf<E>>& call) {
  if (try_backward<E, kCell>(call)) return;
  auto alone = call;
  alone.threads = 1;
  try_backward<E, kCell>(alone);
}

template <class E>
void backward_layer(const BackwardCall<E, ComputeOf<E>>& call) {
  switch (call.shape.cell) {
    case Cell::kRnn:
      return backward_layer_of<E, Cell::kRnn>(call);
    case Cell::kGru:
      return backward_layer_of<E, Cell::kGru>(call);
    case Cell::kLstm:
      return backward_layer_of<E, Cell::kLstm>(call);
  }
}
