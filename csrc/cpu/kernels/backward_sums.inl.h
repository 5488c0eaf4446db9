// The gradients of backward that are sums over rows: of the weights, the biases and the input. Each stretch adds its
// share.
//
// Ownership  The gradients of weights are cut by units, the gradient of the input by rows. The parts are those of a
//            grid without contention, so that contention changes no result.
// Sync       None here. All gate gradients of the stretch must be there: of one direction for the weights, of all
//            directions for the input.

template <class E, Cell kCell>
class BackwardSums {
  using Layer = BackwardLayer<E, kCell>;
  using C = typename Layer::C;
  using V = typename Layer::S::V;
  static constexpr int kLanes = Layer::kLanes;
  static constexpr int kPlanes = Layer::kPlanes, kGates = Layer::kGates;

 public:
  explicit BackwardSums(const Layer& layer) : layer_(layer) {}

  // A stretch's share of one part of all weight gradients. The part has the same units of every gate.
  void add_weights(const typename Layer::Worker& worker, int part, int64_t stretch) const {
    const BackwardDirection<E, C>& direction = layer_.call.direction[worker.d];
    const typename Layer::Direction& own = layer_.direction[worker.d];
    const int parts = layer_.quiet_grid.per_direction();
    const int64_t input_size = layer_.shape.input_size, hidden = layer_.hidden;
    const Range units = part_of(hidden, part, parts), rows = layer_.stretches.rows(stretch);
    const int64_t place = worker.at.direction * parts + part;
    E* const packed = layer_.packed + place * layer_.packed_size;
    const typename OuterSum<E>::Share share{rows.last - rows.first, stretch == layer_.stretches.count() - 1,
                                            stretch == 0};
    // The plane of each gate, for the products with x and with h.
    static constexpr int kGruInput[] = {1, 2, 0}, kGruHidden[] = {1, 2, 3}, kInOrder[] = {0, 1, 2, 3};
    const int* x_planes = kCell == Cell::kGru ? kGruInput : kInOrder;
    const int* h_planes = kCell == Cell::kGru ? kGruHidden : kInOrder;
    const typename OuterSum<E>::Left dgates{own.dgates, kPlanes, hidden, layer_.plane, kPlanes * layer_.plane};
    const OuterSum<E> sum(dgates, units, {packed, layer_.gate_sums + place * layer_.gate_sums_size});
    const auto x = [&](int64_t row) { return layer_.call.input + (rows.first + row) * input_size; };
    const auto h = [&](int64_t row) { return own.previous[rows.first + row]; };
    sum.add(share, WeightGradient{direction.grad_weight_ih, x_planes, kGates, input_size, x},
            WeightGradient{direction.grad_weight_hh, h_planes, kGates, layer_.output_size, h});
    if (share.is_last && direction.grad_bias_ih) {
      sum.totals(direction.grad_bias_ih, x_planes, kGates);
      sum.totals(direction.grad_bias_hh, h_planes, kGates);
    }
    if (const int64_t proj_size = layer_.shape.proj_size) {
      const typename OuterSum<E>::Left dproj{own.dproj, 1, proj_size, layer_.proj_stride, layer_.proj_stride};
      const OuterSum<E> proj(dproj, part_of(proj_size, part, parts),
                             {packed, layer_.proj_sums + place * layer_.proj_sums_size});
      const auto unprojected = [&](int64_t row) { return own.unprojected + row * hidden; };
      proj.add(share, WeightGradient{direction.grad_weight_hr, kInOrder, 1, hidden, unprojected});
    }
  }

  // grad_input of the rows of a stretch, this thread's parts of them.
  void input(int thread, int64_t stretch) const {
    const Range rows = layer_.stretches.rows(stretch);
    for (int part = thread; part < layer_.quiet_grid.size(); part += layer_.grid.size())
      input_rows(rows.first, part_of(rows.last - rows.first, part, layer_.quiet_grid.size()));
  }

 private:
  // grad_input = sum over directions of dgates W_ih, for some rows of a stretch that begins with row `start`.
  void input_rows(int64_t start, Range part) const {
    const PanelShape<E>& panels = layer_.input_panels;
    const int64_t input_size = layer_.shape.input_size, directions = layer_.shape.directions;
    const int64_t stride = kPlanes * layer_.plane;
    V acc[TileSize::kAccumulators], other[TileSize::kAccumulators];
    for (int64_t block = 0; block < panels.blocks(); ++block) {
      const PanelWidth width = panels.width(block);
      for_row_tiles(part.last - part.first, TileSize::rows(width), [&](int64_t first, int count) {
        for (int d = 0; d < directions; ++d) {
          multiply<E>(d ? other : acc, width, count,
                      Operand<E>{layer_.direction[d].dgates + (part.first + first) * stride, stride}, panels.depth,
                      layer_.direction[d].input_panel + panels.offset(block));
        }
        if (directions == 2)
          for (int i = 0; i < count * width; ++i) acc[i] += other[i];
        for (int m = 0; m < count; ++m) {
          for (int v = 0; v < width; ++v) {
            const int64_t column = (panels.first_vector(block) + v) * kLanes;
            E* out = layer_.call.grad_input + (start + part.first + first + m) * input_size + column;
            const int64_t left = input_size - column;
            left >= kLanes ? store_part<true>(out, acc[m * width + v], kLanes)
                           : store_part<false>(out, acc[m * width + v], int(left));
          }
        }
      });
    }
  }

  const Layer& layer_;
};
