// The plan of one forward call: its threads, and in which form each product reads its weights.

// A chunk of W_ih x should stay in L2 beside the weights (1 MiB on Zen 4) and yet hold several full tiles of rows.
constexpr int64_t kChunkBytes = 256 * 1024;
constexpr int64_t kChunkTiles = 4;

// Up to this many rows in all (B 1: steps) the weights, of so many bytes, are read in place: packing them costs more
// than multiplying rows by vectors of k takes longer, the more the farther from the core they lie (Zen 4, H 64 to 1024,
// 4 to 32 rows). Tiles of 4 rows by 4 units spill where there are 16 registers: 16 rows lose there.
inline int64_t in_place_rows(int64_t weight_bytes) {
  if (weight_bytes > 4 << 20) return kAccumulators == 24 ? 16 : 8;
  return weight_bytes > 256 << 10 ? 8 : 4;
}

// Where both weights fit in L2 together, a tile multiplies x and h one after the other and W_ih x never goes through
// memory (LSTM and RNN; GRU's n keeps them apart). From 4 rows on: with fewer, many rows of x at once make better
// tiles (3 rows, H 32 to 256: 1.02-1.11 times faster ahead with AVX-512 on Zen 4, 0.99-1.03 with AVX2).
constexpr int64_t kAtStepBytes = 768 * 1024;
constexpr int64_t kAtStepRows = 4;

enum class InputProduct {
  kAhead,  // W_ih x of a chunk of steps, from packed weights
  // Of all steps, each block of the weights packed just before it multiplies them. Where there are no more rows than I,
  // W_ih x takes no more memory than the packed weight would (LSTM, H 512, B 1, T 100: packing 1.7 -> 0.75 ms a call).
  kInPassing,
  kInPlace,  // of a chunk, from the unpacked weights; so are the other products then
  kAtStep,   // within the step, in the tile that multiplies h
};

struct ForwardPlan {
  ThreadGrid grid;
  int quiet_units;  // grid.units where no other program holds the cores: what cuts products must not depend on that
  InputProduct input;
  bool even_rows;      // the rows of a slice are evenly spaced across time steps: W_ih x is one product per chunk
  int64_t wave_steps;  // 0: the layer is not one of a wavefront
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
  plan.quiet_units = plan.grid.units;
  plan.grid = plan.grid.now();
  plan.even_rows = plan.grid.slices == 1 || (schedule.padded() && schedule.batch % plan.grid.slices == 0);

  bool rows_contiguous = true;  // what in-place products need
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
