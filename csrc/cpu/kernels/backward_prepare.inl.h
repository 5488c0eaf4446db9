// Before the first step of backward: packed weights, the place of each row's previous h, and the gradients of the final
// state.
//
// Ownership  The threads of a direction share all of it.
// Sync       None here. All threads of a direction must wait for each other before the first step.

template <class E, Cell kCell>
class BackwardPreparation {
  using Layer = BackwardLayer<E, kCell>;
  using Worker = typename Layer::Worker;
  using C = typename Layer::C;
  static constexpr int kPlanes = Layer::kPlanes, kGates = Layer::kGates;

 public:
  explicit BackwardPreparation(const Layer& layer) : layer_(layer) {}

  void run(const Worker& worker) const {
    pack_weights(worker);
    find_previous(worker);
    clear_padding(worker);
    set_carry(worker);
  }

 private:
  Range share_of(const Worker& worker, int64_t count) const {
    return part_of(count, worker.at.rank, layer_.grid.per_direction());
  }

  void pack_weights(const Worker& worker) const {
    const DirectionWeights& weights = layer_.call.direction[worker.d].weights;
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const Range hidden = share_of(worker, layer_.hidden_panels.blocks());
    pack_transposed(own.hidden_panel, layer_.hidden_panels, weights.hh, kGates, layer_.hidden, 0, hidden.first,
                    hidden.last);
    if (layer_.shape.proj_size) {
      const Range proj = share_of(worker, layer_.proj_panels.blocks());
      pack_transposed(own.proj_panel, layer_.proj_panels, weights.hr, 1, layer_.shape.proj_size, 0, proj.first,
                      proj.last);
    }
    if (layer_.call.grad_input) {
      const Range input = share_of(worker, layer_.input_panels.blocks());
      // In the order of the planes that multiply x. GRU's planes are n r z, the weight's gates are r z n.
      pack_transposed(own.input_panel, layer_.input_panels, weights.ih, kGates, layer_.hidden,
                      kCell == Cell::kGru ? 2 : 0, input.first, input.last);
    }
  }

  void find_previous(const Worker& worker) const {
    const BackwardDirection<E, C>& given = layer_.call.direction[worker.d];
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int64_t output_size = layer_.output_size;
    const Range steps = share_of(worker, layer_.schedule.steps);
    for (int64_t step = steps.first; step < steps.last; ++step) {
      const int64_t t = time_of(layer_.schedule, worker.d, step);
      for (int64_t b = 0; b < layer_.schedule.count[t]; ++b) {
        const int64_t row = layer_.schedule.offset[t] + b;
        own.previous[row] = layer_.continues(worker.d, step, b)
                                ? layer_.call.output + layer_.row_of(worker.d, step - 1, b) * layer_.output_stride +
                                      worker.d * output_size
                                : given.hx + b * output_size;
      }
    }
  }

  void clear_padding(const Worker& worker) const {
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int64_t plane_size = layer_.plane, proj_stride = layer_.proj_stride;
    const Range kept = share_of(worker, layer_.stretches.kept_rows());
    for (int64_t row = kept.first; row < kept.last; ++row) {
      for (int plane = 0; plane < kPlanes; ++plane)
        for (int64_t unit = layer_.hidden; unit < plane_size; ++unit)
          own.dgates[(row * kPlanes + plane) * plane_size + unit] = E{};
      for (int64_t i = layer_.shape.proj_size; i < proj_stride; ++i) own.dproj[row * proj_stride + i] = E{};
    }
  }

  void set_carry(const Worker& worker) const {
    const BackwardDirection<E, C>& given = layer_.call.direction[worker.d];
    const int64_t hidden = layer_.hidden;
    if (kCell == Cell::kRnn) return;
    const E* grad = kCell == Cell::kLstm ? given.grad_c_n : given.grad_h_n;
    for (int64_t b = worker.at.rank; b < layer_.schedule.batch; b += layer_.grid.per_direction()) {
      C* carry = layer_.direction[worker.d].carry + b * hidden;
      for (int64_t unit = 0; unit < hidden; ++unit) carry[unit] = grad ? widen(grad[b * hidden + unit]) : C(0);
    }
  }

  const Layer& layer_;
};
