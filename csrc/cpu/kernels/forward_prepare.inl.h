// Before the first step of forward: packed weights, biases and the initial state.
//
// Ownership  The workers of one part of the units, one per slice, share the packing of that part. Each sets up its own
//            share of the initial state.
// Sync       None here. All threads of a direction must wait for each other before the first step.
// Limits     Weights are packed at every call, so that a stale copy cannot exist.

template <class E, Cell kCell>
class ForwardPreparation {
  using Layer = ForwardLayer<E, kCell>;
  using C = typename Layer::C;
  static constexpr int kGates = Layer::kGates;

 public:
  explicit ForwardPreparation(const Layer& layer) : layer_(layer) {}

  void run(const typename Layer::Worker& worker) const {
    const Range share = part_of(worker.blocks.last - worker.blocks.first, worker.slice, layer_.grid.slices);
    const int64_t first = worker.blocks.first + share.first, last = worker.blocks.first + share.last;
    pack_bias(worker.d, first, last);
    pack_weights(worker, first, last);
    set_initial_state(worker);
  }

 private:
  void pack_weights(const typename Layer::Worker& worker, int64_t first, int64_t last) const {
    const DirectionWeights& weights = layer_.call.direction[worker.d].weights;
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int slices = layer_.grid.slices, parts = layer_.grid.unit_parts;
    const Range proj = part_of(layer_.proj_panels.blocks(), worker.slice * parts + worker.part, slices * parts);
    if (own.input_panel) pack_panels(own.input_panel, layer_.input_panels, weights.ih, first, last);
    if (own.hidden_panel) pack_panels(own.hidden_panel, layer_.hidden_panels, weights.hh, first, last);
    if (own.proj_panel) pack_panels(own.proj_panel, layer_.proj_panels, weights.hr, proj.first, proj.last);
  }

  void set_initial_state(const typename Layer::Worker& worker) const {
    const ForwardDirection<E, C>& given = layer_.call.direction[worker.d];
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int64_t hidden = layer_.shape.hidden_size, output_size = layer_.output_size;
    const int64_t stride = layer_.hidden_stride, slices = layer_.grid.slices;
    for (int64_t b = worker.slice; b < layer_.schedule.batch; b += slices) {
      if (b / slices % layer_.grid.unit_parts != worker.part) continue;
      for (E* h : own.h) {
        std::memcpy(h + b * stride, given.hx + b * output_size, output_size * sizeof(E));
        std::memset(h + b * stride + output_size, 0, (stride - output_size) * sizeof(E));
      }
      if (kCell == Cell::kLstm)
        for (int64_t u = 0; u < hidden; ++u) own.c[b * hidden + u] = widen(given.cx[b * hidden + u]);
      if (layer_.shape.proj_size)
        std::memset(own.unprojected + b * layer_.unprojected_stride, 0, layer_.unprojected_stride * sizeof(E));
    }
  }

  // Columns, gates counted, of the blocks [first, last).
  int64_t panel_width(int64_t first, int64_t last) const {
    return layer_.hidden_panels.position(last) - layer_.hidden_panels.position(first);
  }

  void pack_bias(int d, int64_t first, int64_t last) const {
    const DirectionWeights& weights = layer_.call.direction[d].weights;
    const typename Layer::Direction& own = layer_.direction[d];
    const PanelShape<E>& panels = layer_.hidden_panels;
    const int64_t first_unit = panels.first_column(first), last_unit = panels.first_column(last);
    if (kCell == Cell::kGru) std::memset(own.bias_hidden + first_unit, 0, (last_unit - first_unit) * sizeof(C));
    C* const bias = own.bias + panels.position(first);
    std::memset(bias, 0, panel_width(first, last) * sizeof(C));
    if (!weights.bias_ih.data) return;
    for (int64_t block = first; block < last; ++block) {
      const int64_t unit = panels.first_column(block), units = panels.columns_in(block);
      for (int gate = 0; gate < kGates; ++gate) {
        C* const out = bias + panel_width(first, block) + gate * panels.gate_stride(block);
        for (int64_t u = 0; u < units; ++u) {
          const int64_t row = gate * layer_.shape.hidden_size + unit + u;
          const C from_input = widen(static_cast<const E*>(weights.bias_ih.data)[row * weights.bias_ih.row_stride]);
          const C from_hidden = widen(static_cast<const E*>(weights.bias_hh.data)[row * weights.bias_hh.row_stride]);
          const bool apart = kCell == Cell::kGru && gate == 2;  // r multiplies W_hn h + b_hn as a whole
          out[u] = apart ? from_input : from_input + from_hidden;
          if (apart) own.bias_hidden[unit + u] = from_hidden;
        }
      }
    }
  }

  const Layer& layer_;
};
