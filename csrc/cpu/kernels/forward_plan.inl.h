// The plan of one layer's forward call: its threads, and the form in which each product reads its weights.

// A chunk of W_ih x should stay in L2 beside the weights (1 MiB on Zen 4), and yet hold several full tiles of rows.
constexpr int64_t kChunkBytes = 256 * 1024;
constexpr int64_t kChunkTiles = 4;

// The largest call, in rows of all steps, whose weights are read in place. Below this count, packing costs more than
// the slower unpacked product. The break-even rises with the size of the weights (Zen 4, H 64 to 1024, 4 to 32 rows).
inline int64_t in_place_rows(int64_t weight_bytes) {
  if (weight_bytes > 4 << 20) return TileSize::kInPlaceRows;
  return weight_bytes > 256 << 10 ? 8 : 4;
}

// Where both weights fit in L2 together, a tile multiplies x and then h, and W_ih x never goes through memory. This is
// for LSTM and RNN, because the GRU keeps the two parts of n apart. With fewer than kAtStepRows rows, many rows of x at
// once make better tiles (3 rows, H 32 to 256: forming W_ih x ahead is 1.02-1.11 times faster with AVX-512 on Zen 4,
// 0.99-1.03 with AVX2).
constexpr int64_t kAtStepBytes = 768 * 1024;
constexpr int64_t kAtStepRows = 4;

// When W_ih x is formed, and from what.
enum class InputProduct {
  kAhead,  // for a chunk of steps, from packed weights
  // For all steps at once. Each block of the weights is packed just before its product and then forgotten. With no more
  // rows than I, W_ih x takes no more memory than the packed weight would. (LSTM, H 512, B 1, T 100: packing takes 0.75
  // ms per call instead of 1.7, Zen 4.)
  kInPassing,
  kInPlace,  // for a chunk of steps, from unpacked weights; the other products read unpacked weights, too
  kAtStep,   // within the step, in the tile that multiplies h
};

struct ForwardPlan {
  ThreadGrid grid;
  // grid.unit_parts as if no other program held the cores. Products are cut by it, so contention changes no result.
  int quiet_unit_parts;
  InputProduct input;
  bool even_rows;      // a slice's rows are evenly spaced across time steps, so W_ih x is one product per chunk
  int64_t wave_steps;  // steps of a chunk of a wavefront; 0: the layer is in none
};

template <class E, class C>
double flops_of(const ForwardCall<E, C>& call) {
  const LayerShape& shape = call.shape;
  return 2. * call.schedule->total * shape.directions * shape.gate_rows() * (shape.input_size + shape.output_size());
}

template <class E, class C>
ThreadGrid grid_of(const ForwardCall<E, C>& call, int threads) {
  const LayerShape& shape = call.shape;
  const int64_t unit_blocks = PanelShape<E>{shape.hidden_size, shape.output_size(), gate_count(shape.cell)}.blocks();
  const int64_t hidden_bytes = shape.gate_rows() * shape.output_size() * int64_t(sizeof(E));
  return make_grid(threads, shape.directions, call.schedule->batch, unit_blocks, hidden_bytes, flops_of(call),
                   call.schedule->steps);
}

template <class E, class C>
ForwardPlan make_plan(const ForwardCall<E, C>& call, int threads, int64_t wave_steps) {
  const LayerShape& shape = call.shape;
  const Schedule& schedule = *call.schedule;
  const int64_t output_size = shape.output_size(), gate_rows = shape.gate_rows();
  const int64_t input_bytes = gate_rows * shape.input_size * int64_t(sizeof(E));
  const int64_t hidden_bytes = gate_rows * output_size * int64_t(sizeof(E));
  ForwardPlan plan;
  plan.wave_steps = wave_steps;
  plan.grid = grid_of(call, threads);
  plan.quiet_unit_parts = plan.grid.unit_parts;
  plan.grid = plan.grid.now();
  plan.even_rows = plan.grid.slices == 1 || (schedule.padded() && schedule.batch % plan.grid.slices == 0);

  bool rows_contiguous = true;  // in-place products need it
  for (int d = 0; d < shape.directions; ++d) {
    const DirectionWeights& weights = call.direction[d].weights;
    rows_contiguous = rows_contiguous && weights.ih.column_stride == 1 && weights.hh.column_stride == 1 &&
                      (!shape.proj_size || weights.hr.column_stride == 1);
  }
  const int64_t bytes = input_bytes + hidden_bytes;
  const bool in_place = rows_contiguous && schedule.total <= in_place_rows(bytes);
  if (in_place)
    plan.input = InputProduct::kInPlace;
  else if (shape.cell != Cell::kGru && bytes <= kAtStepBytes && schedule.batch / plan.grid.slices >= kAtStepRows)
    plan.input = InputProduct::kAtStep;
  else if (plan.grid.slices == 1 && schedule.total <= shape.input_size && !wave_steps)
    plan.input = InputProduct::kInPassing;
  else
    plan.input = InputProduct::kAhead;
  return plan;
}
