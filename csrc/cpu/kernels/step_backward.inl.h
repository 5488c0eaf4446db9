// Backward of one time step of few rows: a cell's step, or a layer at T = 1.
//
// LayerBackward packs the transposed weights, which would cost several times the step itself. Here the weights are read
// once, row by row, in place. Their gradients are outer products of few terms and are written once.
//
// Shapes     dgates [rows, planes * H], one copy per thread and direction
// Ownership  Every thread computes all gate gradients for itself, because they are few. Then it has a part of the
//            columns of the gradients of h and x, and a part of the units of the weight gradients.
// Sync       None.
// Limits     Up to kStepBackwardRows rows, no projection, and contiguous rows of the weights.

// The weights are read once per group of TileSize::kMaxRows rows. With 16 rows, the sums for the weights still run at
// MKL's rate or above (Zen 4, H 256 and 512). More rows were not tried.
constexpr int64_t kStepBackwardRows = 16;

// The products of a step with its gate gradients dgates [rows, stride]. `planes` has the plane of each gate.
template <class T>
struct StepProducts {
  using S = Simd<T>;
  using V = typename S::V;
  static constexpr int kLanes = S::kLanes;

  int64_t rows, hidden, stride;
  int gates, threads;

  // grad_W[gate * H + unit] = sum over rows of dgates[row, plane of the gate, unit] * right[row]. Four units share the
  // loads of `right`. With few rows, memory is the limit. Then it is one unit at a time, which writes in order.
  void outer_products(const T* dgates, const int* planes, const T* right, int64_t columns, T* out, Range units) const {
    for (int gate = 0; gate < gates; ++gate) {
      const T* const left = dgates + planes[gate] * hidden;
      int64_t unit = units.first;
      for (; rows > 2 && unit + 4 <= units.last; unit += 4)
        outer_units<4>(left + unit, right, columns, out + (gate * hidden + unit) * columns);
      for (; unit < units.last; ++unit)
        outer_units<1>(left + unit, right, columns, out + (gate * hidden + unit) * columns);
    }
  }

  template <int kUnits>
  void outer_units(const T* left, const T* right, int64_t columns, T* out) const {
    constexpr int kVectors = 4;
    int64_t column = 0;
    for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes)
      outer_tile<kUnits, kVectors, true>(left, right + column, columns, out + column, kLanes);
    for (; column < columns; column += kLanes) {
      const int lanes = int(std::min<int64_t>(kLanes, columns - column));
      lanes == kLanes ? outer_tile<kUnits, 1, true>(left, right + column, columns, out + column, lanes)
                      : outer_tile<kUnits, 1, false>(left, right + column, columns, out + column, lanes);
    }
  }

  template <int kUnits, int kVectors, bool kFull>
  void outer_tile(const T* left, const T* right, int64_t columns, T* out, int lanes) const {
    V sums[kUnits][kVectors] = {};
    for (int64_t row = 0; row < rows; ++row) {
      V x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) x[v] = load_part<kFull>(right + row * columns + v * kLanes, lanes);
#pragma GCC unroll 4
      for (int u = 0; u < kUnits; ++u)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[u][v] += x[v] * S::set(left[row * stride + u]);
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store_part<kFull>(out + u * columns + v * kLanes, sums[u][v], lanes);
  }

  void totals(const T* dgates, const int* planes, T* out, Range units) const {
    for (int gate = 0; gate < gates; ++gate) {
      for (int64_t unit = units.first; unit < units.last; ++unit) {
        T sum = 0;
        for (int64_t row = 0; row < rows; ++row) sum += dgates[row * stride + planes[gate] * hidden + unit];
        out[gate * hidden + unit] = sum;
      }
    }
  }

  // out[row] = start[row] + dgates[row] W, this thread's part of the columns. start null: zero.
  void multiply_weight(const T* dgates, const int* planes, const Weight& weight, int64_t columns, const T* start,
                       T* out, int thread) const {
    const Range vectors = part_of(ceil_div(columns, kLanes), thread, threads);
    for_row_tiles(rows, TileSize::kMaxRows, [&](int64_t first, int count) {
      const RowGroup group{dgates + first * stride, start ? start + first * columns : nullptr, out + first * columns};
      if (count == 1) multiply_group<1>(group, planes, weight, columns, vectors);
      if (count == 2) multiply_group<2>(group, planes, weight, columns, vectors);
      if (count == 3) multiply_group<3>(group, planes, weight, columns, vectors);
      if (count == 4) multiply_group<4>(group, planes, weight, columns, vectors);
      if (count == 5) multiply_group<5>(group, planes, weight, columns, vectors);
      if (count == 6) multiply_group<6>(group, planes, weight, columns, vectors);
      if (count == 7) multiply_group<7>(group, planes, weight, columns, vectors);
      if (count == 8) multiply_group<8>(group, planes, weight, columns, vectors);
    });
  }

  struct RowGroup {
    const T *dgates, *start;
    T* out;
  };

  template <int R>
  void multiply_group(const RowGroup& group, const int* planes, const Weight& weight, int64_t columns,
                      Range vectors) const {
    constexpr int kVectors = std::min(TileSize::kAccumulators / R, 8);
    int64_t vector = vectors.first;
    for (; vector + kVectors <= vectors.last && (vector + kVectors) * kLanes <= columns; vector += kVectors)
      multiply_tile<R, kVectors, true>(group, planes, weight, columns, vector * kLanes, kLanes);
    for (; vector < vectors.last; ++vector) {
      const int lanes = int(std::min<int64_t>(kLanes, columns - vector * kLanes));
      lanes == kLanes ? multiply_tile<R, 1, true>(group, planes, weight, columns, vector * kLanes, lanes)
                      : multiply_tile<R, 1, false>(group, planes, weight, columns, vector * kLanes, lanes);
    }
  }

  template <int R, int NV, bool kFull>
  void multiply_tile(const RowGroup& group, const int* planes, const Weight& weight, int64_t columns, int64_t column,
                     int lanes) const {
    V total[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        total[r][v] = group.start ? load_part<kFull>(group.start + r * columns + column + v * kLanes, lanes) : V{};
    for (int gate = 0; gate < gates; ++gate) {
      const T* const w = static_cast<const T*>(weight.data) + gate * hidden * weight.row_stride + column;
      const T* const left = group.dgates + planes[gate] * hidden;
      for (int64_t begin = 0; begin < hidden; begin += kChainDepth) {
        const int64_t end = std::min<int64_t>(begin + kChainDepth, hidden);
        V sums[R][NV] = {};
        for (int64_t unit = begin; unit < end; ++unit) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            const V right = load_part<kFull>(w + unit * weight.row_stride + v * kLanes, lanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[r][v] += right * S::set(left[r * stride + unit]);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) total[r][v] += sums[r][v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store_part<kFull>(group.out + r * columns + column + v * kLanes, total[r][v], lanes);
  }
};

template <class T, Cell kCell>
class StepBackward {
  using S = Simd<T>;
  using V = typename S::V;
  using Math = CellMath<S>;
  using Products = StepProducts<T>;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kGates = gate_count(kCell);
  static constexpr int kPlanes = grad_planes(kCell);
  // The plane of each gate, for the products with x and with h. GRU's planes are n_x r z n_h.
  static constexpr int kInput[4] = {kCell == Cell::kGru ? 1 : 0, kCell == Cell::kGru ? 2 : 1,
                                    kCell == Cell::kGru ? 0 : 2, 3};
  static constexpr int kHidden[4] = {kCell == Cell::kGru ? 1 : 0, kCell == Cell::kGru ? 2 : 1,
                                     kCell == Cell::kGru ? 3 : 2, 3};

 public:
  static bool takes(const BackwardCall<T, T>& call) {
    bool in_place = call.schedule->steps == 1 && call.schedule->batch <= kStepBackwardRows && !call.shape.proj_size;
    for (int d = 0; d < call.shape.directions; ++d) {
      const DirectionWeights& weights = call.direction[d].weights;
      in_place = in_place && weights.ih.column_stride == 1 && weights.hh.column_stride == 1;
    }
    return in_place;
  }

  explicit StepBackward(const BackwardCall<T, T>& call)
      : call_(call),
        shape_(call.shape),
        rows_(call.schedule->batch),
        hidden_(call.shape.hidden_size),
        stride_(kPlanes * call.shape.hidden_size) {
    const double flops = 6. * rows_ * shape_.directions * shape_.gate_rows() * (shape_.input_size + shape_.hidden_size);
    threads_ = int(std::clamp<double>(flops / kFlopsPerThread, 1, call.threads));
    workspace_.lay_out([this] { take_arrays(); });
  }

  // False if the threads could not be had: then nothing was done.
  bool run() {
    return run_threads(threads_, [&](int thread) { run_thread(thread); });
  }

 private:
  void take_arrays() {
    dgates_ = workspace_.take<T>(threads_ * shape_.directions * rows_ * stride_);
    carry_ = workspace_.take<T>(kCell == Cell::kGru ? threads_ * shape_.directions * rows_ * hidden_ : 0);
  }

  void run_thread(int thread) {
    const Products products{rows_, hidden_, stride_, kGates, threads_};
    for (int d = 0; d < shape_.directions; ++d) {
      const BackwardDirection<T, T>& direction = call_.direction[d];
      T* const dgates = dgates_of(thread, d);
      T* const carry = kCell == Cell::kGru ? carry_ + (thread * shape_.directions + d) * rows_ * hidden_ : nullptr;
      // Only the first thread stores the gradient of c.
      T* const grad_cx = thread == 0 ? direction.grad_cx : nullptr;
      for (int64_t row = 0; row < rows_; ++row) {
        for (int64_t unit = 0; unit < hidden_; unit += kLanes)
          hidden_ - unit >= kLanes ? gate_gradients<true>(d, row, unit, kLanes, dgates, carry, grad_cx)
                                   : gate_gradients<false>(d, row, unit, int(hidden_ - unit), dgates, carry, grad_cx);
      }
      if (direction.grad_weight_ih) {
        const Range units = part_of(hidden_, thread, threads_);
        products.outer_products(dgates, kInput, call_.input, shape_.input_size, direction.grad_weight_ih, units);
        products.outer_products(dgates, kHidden, direction.hx, hidden_, direction.grad_weight_hh, units);
        if (direction.grad_bias_ih) {
          products.totals(dgates, kInput, direction.grad_bias_ih, units);
          products.totals(dgates, kHidden, direction.grad_bias_hh, units);
        }
      }
      if (direction.grad_hx)
        products.multiply_weight(dgates, kHidden, direction.weights.hh, hidden_, carry, direction.grad_hx, thread);
      if (call_.grad_input)
        products.multiply_weight(dgates, kInput, direction.weights.ih, shape_.input_size,
                                 d ? call_.grad_input : nullptr, call_.grad_input, thread);
    }
  }

  T* dgates_of(int thread, int d) const { return dgates_ + (thread * shape_.directions + d) * rows_ * stride_; }

  template <bool kFull>
  void gate_gradients(int d, int64_t row, int64_t unit, int count, T* dgates, T* carry, T* grad_cx) const {
    const BackwardDirection<T, T>& direction = call_.direction[d];
    const int64_t state = row * hidden_ + unit, hidden = hidden_;
    const int64_t result = (row * shape_.directions + d) * hidden_ + unit;
    V dh{};
    if (call_.grad_output) dh += load_part<kFull>(call_.grad_output + result, count);
    if (direction.grad_h_n) dh += load_part<kFull>(direction.grad_h_n + state, count);
    T* const out = dgates + row * stride_ + unit;
    const T* const gates = kCell == Cell::kRnn ? nullptr : direction.gates + row * saved_planes(kCell) * hidden + unit;
    if constexpr (kCell == Cell::kRnn) {
      store_part<kFull>(out, Math::rnn_backward(dh, load_part<kFull>(call_.output + result, count), shape_.relu),
                        count);
      return;
    } else if constexpr (kCell == Cell::kGru) {
      const auto grad =
          Math::gru_backward(dh, load_part<kFull>(gates, count), load_part<kFull>(gates + hidden, count),
                             load_part<kFull>(gates + 2 * hidden, count), load_part<kFull>(gates + 3 * hidden, count),
                             load_part<kFull>(direction.hx + state, count));
      store_part<kFull>(out, grad.n_x, count);
      store_part<kFull>(out + hidden, grad.r, count);
      store_part<kFull>(out + 2 * hidden, grad.z, count);
      store_part<kFull>(out + 3 * hidden, grad.n_h, count);
      store_part<kFull>(carry + state, grad.carry, count);
    } else {
      const V dc = direction.grad_c_n ? load_part<kFull>(direction.grad_c_n + state, count) : V{};
      const auto grad = Math::lstm_backward(
          dh, dc, load_part<kFull>(gates, count), load_part<kFull>(gates + hidden, count),
          load_part<kFull>(gates + 2 * hidden, count), load_part<kFull>(gates + 3 * hidden, count),
          load_part<kFull>(direction.cells + state, count), load_part<kFull>(direction.cx + state, count));
      store_part<kFull>(out, grad.i, count);
      store_part<kFull>(out + hidden, grad.f, count);
      store_part<kFull>(out + 2 * hidden, grad.g, count);
      store_part<kFull>(out + 3 * hidden, grad.o, count);
      if (grad_cx) store_part<kFull>(grad_cx + state, grad.dc, count);
    }
  }

  const BackwardCall<T, T>& call_;
  const LayerShape& shape_;
  const int64_t rows_, hidden_, stride_;
  int threads_;
  Workspace workspace_;
  T *dgates_ = nullptr, *carry_ = nullptr;
};
