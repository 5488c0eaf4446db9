// The whole-row epilogue: the end of a step for what needs all units of a row.
//
// A tile ends with a few units of a row, and the unit epilogue (cell_rows.inl.h) handles those. Where h depends on all
// units of the row, the unit epilogue stores into input() instead of h, and run() makes h of it. The projection is the
// only user: h = W_hr (o tanh(c)). A layer norm belongs here, too.
//
// Shapes     input [B, unprojected_stride], h of the next step [B, hidden_stride], output [rows, D * Hout]
// Ownership  All threads of a team call run() at the same step, for the rows of their slice. They may share this work
//            in any way: the projection cuts it by columns.
// Sync       The caller has a barrier of the team before run(), after which input() is complete, and one after it.

template <class E, Cell kCell>
class WholeRowEpilogue {
  using Layer = ForwardLayer<E, kCell>;
  using S = typename Layer::S;
  using V = typename S::V;
  static constexpr int kLanes = Layer::kLanes;

 public:
  explicit WholeRowEpilogue(const Layer& layer) : layer_(layer) {}

  // Whether this layer has one.
  bool needed() const { return layer_.shape.proj_size > 0; }

  // Where the unit epilogue stores its result of sequence b, and the distance to that of sequence b + 1.
  E* input(int d, int64_t b) const { return layer_.direction[d].unprojected + b * layer_.unprojected_stride; }
  int64_t input_stride() const { return layer_.unprojected_stride; }

  void run(const typename Layer::Worker& worker, int64_t step, int64_t t, int64_t rows) const {
    const Range blocks = part_of(layer_.proj_panels.blocks(), worker.part, worker.team.size());
    for (int64_t block = blocks.first; block < blocks.last; ++block) project(worker, step, t, block, rows);
  }

 private:
  // h = W_hr (o * tanh(c)) for one block of columns.
  void project(const typename Layer::Worker& worker, int64_t step, int64_t t, int64_t block, int64_t rows) const {
    const PanelShape<E>& panels = layer_.proj_panels;
    const int64_t slices = layer_.grid.slices;
    const Operand<E> from{input(worker.d, worker.slice), slices * input_stride()};
    const PanelWidth width = panels.width(block);
    const E* const panel = Layer::panel_of(layer_.direction[worker.d].proj_panel, panels, block);
    V acc[TileSize::kAccumulators];
    for_row_tiles(rows, TileSize::rows(width), [&](int64_t first, int count) {
      multiply_block(acc, panels, block, count, from.from_row(first), panel,
                     layer_.call.direction[worker.d].weights.hr);
      for (int m = 0; m < count; ++m) {
        const int64_t b = worker.slice + (first + m) * slices, row = layer_.schedule.offset[t] + b;
        for (int v = 0; v < width; ++v) {
          const int64_t column = (panels.first_vector(block) + v) * kLanes, left = layer_.shape.proj_size - column;
          if (left >= kLanes)
            store<true>(worker.d, step, row, b, column, kLanes, acc[m * width + v]);
          else
            store<false>(worker.d, step, row, b, column, int(left), acc[m * width + v]);
        }
      }
    });
  }

  template <bool kFull>
  RNNFAST_INLINE void store(int d, int64_t step, int64_t row, int64_t b, int64_t column, int count, V h) const {
    E* output = layer_.call.output + row * layer_.call.output_stride + d * layer_.output_size + column;
    E* next = layer_.direction[d].h[(step + 1) % 2] + b * layer_.hidden_stride + column;
    store_part<kFull>(output, h, count);
    store_part<kFull>(next, h, count);
  }

  const Layer& layer_;
};
