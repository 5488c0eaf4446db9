// The direct form of the product: from a row-major weight, without packing.
//
// Calls of few rows use it (a streaming step, a cell). Packing would cost them several times the product itself.
// The rows of the weight are dotted with the rows of A. A tile holds R x kUnits vectors of partial sums over k. Then
// the lanes of each vector are added up. What is left are vectors of units, as multiply() gives them.
//
// Shapes   as in tile_product.inl.h; A may have any number of rows.
// Limits   column_stride of the weight is 1, and the panel's shape is not dense.

// The operand of one multiply: kLanes elements, or pairs of bfloat16. Only the first `count` elements without kFull.
template <class E, bool kFull>
RNNFAST_INLINE typename Simd<ComputeOf<E>>::V dot_load(const E* p, [[maybe_unused]] int count) {
  using S = Simd<ComputeOf<E>>;
  if constexpr (kPair<E> == 1) {
    return kFull ? S::load(p) : S::load_first(p, count);
  } else {
    typename S::V v{};  // bits of 2 * kLanes elements
    std::memcpy(&v, p, kFull ? sizeof v : size_t(count) * sizeof(E));
    return v;
  }
}

// sum + a * w, lane by lane.
template <class E>
RNNFAST_INLINE typename Simd<ComputeOf<E>>::V dot_add(typename Simd<ComputeOf<E>>::V sum,
                                                      typename Simd<ComputeOf<E>>::V a,
                                                      typename Simd<ComputeOf<E>>::V w) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, BFloat16>)
    return (typename Simd<float>::V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
  else
#endif
    return sum + a * w;
}

// R rows of A times kUnits rows of the weight. Each vector sums[row * kLanes + unit] still has kLanes partial sums.
template <class E, int R, int kUnits>
void dot_tile(typename Simd<ComputeOf<E>>::V* sums, Operand<E> a, int64_t depth, const E* weight, int64_t stride) {
  using S = Simd<ComputeOf<E>>;
  using V = typename S::V;
  constexpr int kWidth = S::kLanes * kPair<E>;
  V acc[R][kUnits];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) acc[r][u] = V{};
  const auto step = [&]<bool kFull>(std::bool_constant<kFull>, int64_t k, int count) __attribute__((always_inline)) {
    V left[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) left[r] = dot_load<E, kFull>(a.data + r * a.row_stride + k, count);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      const V right = dot_load<E, kFull>(weight + u * stride + k, count);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][u] = dot_add<E>(acc[r][u], left[r], right);
    }
  };
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) step(std::true_type(), k, kWidth);
  if (k < depth) step(std::false_type(), k, int(depth - k));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) sums[r * S::kLanes + u] = acc[r][u];
}

// Lane i of the result is the sum over the lanes of vector i. Each of log2(kLanes) rounds folds vectors i and i + half
// into one. This takes half of the shuffles of a transpose.
template <class T>
RNNFAST_INLINE typename Simd<T>::V lane_sums(typename Simd<T>::V (&v)[Simd<T>::kLanes]) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    typename Simd<T>::B low{}, high{};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      const int block = lane / (2 * half) * (2 * half), in_block = lane % (2 * half);
      low[lane] = block + (in_block < half ? in_block : kLanes + in_block - half);
      high[lane] = low[lane] + half;
    }
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      v[i] = __builtin_shuffle(v[i], v[i + half], low) + __builtin_shuffle(v[i], v[i + half], high);
  }
  return v[0];
}

// Units and rows that share their loads. A pair of them has one accumulator. 6 rows at once take 0.75 of the time of 3
// and 3 (AVX-512, H 256). With the 16 registers of AVX2, 3 and 4 rows take equal time.
constexpr int kDotUnits = TileSize::kDotUnits, kDotRows = TileSize::kAccumulators / kDotUnits;

// One vector of units for R rows. out[r * out_stride] has the dot products of A's row r with `count` weight rows.
template <class E, int R>
void dot_vector(typename Simd<ComputeOf<E>>::V* out, int out_stride, Operand<E> a, int64_t depth, const E* weight,
                int64_t stride, int count) {
  using S = Simd<ComputeOf<E>>;
  using V = typename S::V;
  constexpr int kUnits = std::min(R == 1 ? 8 : kDotUnits, S::kLanes);
  V sums[R * S::kLanes];
  int unit = 0;
  for (; unit + kUnits <= count; unit += kUnits)
    dot_tile<E, R, kUnits>(sums + unit, a, depth, weight + unit * stride, stride);
  for (; unit < count; ++unit) dot_tile<E, R, 1>(sums + unit, a, depth, weight + unit * stride, stride);
  for (; unit < S::kLanes; ++unit)
    for (int r = 0; r < R; ++r) sums[r * S::kLanes + unit] = V{};
  for (int r = 0; r < R; ++r) {
    V columns[S::kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < S::kLanes; ++lane) columns[lane] = sums[r * S::kLanes + lane];
    out[r * out_stride] = lane_sums<ComputeOf<E>>(columns);
  }
}

template <class E, int... kIndex>
void dot_rows(typename Simd<ComputeOf<E>>::V* out, int out_stride, int rows, Operand<E> a, int64_t depth,
              const E* weight, int64_t stride, int count, std::integer_sequence<int, kIndex...>) {
  ((rows == kIndex + 1 ? dot_vector<E, kIndex + 1>(out, out_stride, a, depth, weight, stride, count) : void()), ...);
}

// As multiply() for one block of `shape`, from the weight itself.
template <class E>
void multiply_direct(typename Simd<ComputeOf<E>>::V* out, const PanelShape<E>& shape, int64_t block, int rows,
                     Operand<E> a, const Weight& weight) {
  constexpr int kLanes = PanelShape<E>::kLanes;
  const int width = shape.width(block);
  for (int v = 0; v < width; ++v) {
    const int64_t column = (shape.first_vector(block) + (shape.gates > 1 ? 0 : v)) * kLanes;
    const int64_t row = (shape.gates > 1 ? v : 0) * shape.columns + column;
    const E* data = static_cast<const E*>(weight.data) + row * weight.row_stride;
    const int count = int(std::min<int64_t>(kLanes, shape.columns - column));
    for_row_tiles(rows, kDotRows, [&](int64_t first, int group) {
      dot_rows<E>(out + first * width + v, width, group, a.from_row(first), shape.depth, data, weight.row_stride, count,
                  std::make_integer_sequence<int, kDotRows>());
    });
  }
}

// One block of A W^T: from a packed panel, or from the weight itself where `panel` is null.
template <class E>
RNNFAST_INLINE void multiply_block(typename Simd<ComputeOf<E>>::V* out, const PanelShape<E>& shape, int64_t block,
                                   int rows, Operand<E> a, const E* panel, const Weight& weight) {
  if (panel)
    multiply<E>(out, shape.width(block), rows, a, shape.padded_depth(), panel);
  else
    multiply_direct<E>(out, shape, block, rows, a, weight);
}
