// The matrix product of the kernels: a tile of sums in registers, which streams a panel of packed weights front to
// back.
//
// Shapes   out [rows][vectors] = A [rows, depth] * panel [depth][vectors][lanes]; panels.inl.h describes panels.
//          rows <= TileSize::rows(vectors), vectors <= TileSize::kMaxVectors.
// Limits   bfloat16: depth is even, because operands and panels are zero-padded to whole pairs.
//
// Almost every product of the kernels goes through multiply(). Activations and gradients then work on `out`, a few
// cache lines of stack. direct.inl.h multiplies weights that are not packed.

// Runs body(first row, rows) over `rows` rows, in nearly equal groups of at most `limit`. A last group of one row would
// be slow: the stream of weights would limit it.
template <class Body>
RNNFAST_INLINE void for_row_tiles(int64_t rows, int limit, Body&& body) {
  const int64_t groups = ceil_div(rows, limit);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * rows / groups;
    body(first, int((group + 1) * rows / groups - first));
  }
}

// A[row, k] = data[row * row_stride + k * k_stride]. For bfloat16 this holds for even k; odd k follow right behind.
template <class E>
struct Operand {
  const E* data;
  int64_t row_stride;
  int64_t k_stride = 1;
  RNNFAST_INLINE Operand from_row(int64_t row) const { return {data + row * row_stride, row_stride, k_stride}; }
};

// The sums of a tile of MB rows and NV vectors. kHalf: the last vector has half as many lanes.
template <class T, int NV, int MB, bool kHalf>
struct Sums {
  using V = typename Simd<T>::V;
  static constexpr int kFull = NV;
  V full[MB][NV];
  RNNFAST_INLINE V at(int m, int v) const { return full[m][v]; }
};
template <class T, int NV, int MB>
struct Sums<T, NV, MB, true> {
  using V = typename Simd<T>::V;
  static constexpr int kFull = NV - 1;
  V full[MB][std::max(kFull, 1)];
  typename Simd<T>::Half half[MB];
  RNNFAST_INLINE V at(int m, int v) const { return v < kFull ? full[m][v] : Simd<T>::from_half(half[m]); }
};

// sums[row][vector] += A[row, k] * panel[k][vector].
template <class E, int NV, int MB, bool kHalf>
RNNFAST_INLINE void multiply_add(Sums<ComputeOf<E>, NV, MB, kHalf>& sums, Operand<E> a, int64_t k, const E* panel) {
  using S = Simd<ComputeOf<E>>;
  using V = typename S::V;
  using C = ComputeOf<E>;
  constexpr int kLanes = S::kLanes * kPair<E>;
  constexpr int kFull = Sums<ComputeOf<E>, NV, MB, kHalf>::kFull;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, BFloat16>) {
    __m512bh weight[NV];
#pragma GCC unroll 16
    for (int v = 0; v < kFull; ++v) weight[v] = (__m512bh)_mm512_loadu_si512(panel + v * kLanes);
    [[maybe_unused]] __m256bh half;
    if constexpr (kHalf) half = (__m256bh)_mm256_loadu_si256((const __m256i*)(panel + kFull * kLanes));
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      int32_t pair;
      std::memcpy(&pair, a.data + m * a.row_stride + k * a.k_stride, sizeof pair);
      const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int v = 0; v < kFull; ++v)
        sums.full[m][v] = (V)_mm512_dpbf16_ps((__m512)sums.full[m][v], broadcast, weight[v]);
      if constexpr (kHalf)
        sums.half[m] =
            (typename S::Half)_mm256_dpbf16_ps((__m256)sums.half[m], (__m256bh)S::low_half((V)broadcast), half);
    }
    return;
  } else
#endif
  {
    V weight[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) weight[v] = S::load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m) {
      const C value = a.data[m * a.row_stride + k * a.k_stride];
      const V broadcast = S::set(value);
#pragma GCC unroll 16
      for (int v = 0; v < kFull; ++v) sums.full[m][v] += broadcast * weight[v];
      if constexpr (kHalf && kFull > 0)
        sums.half[m] += S::low_half(broadcast) * S::low_half(weight[kFull]);
      else if constexpr (kHalf)  // the multiply instruction itself broadcasts from memory
        sums.half[m] += (value - typename S::Half{}) * S::low_half(weight[kFull]);
    }
  }
}

// Longest chain of additions into one register. A sum of thousands in a single chain would round worse than torch's.
constexpr int64_t kChainDepth = 256;

// out[MB][NV] = A[MB rows, depth] * panel. `add`: it is added to `out`. Sums are cut into segments of kChainDepth.
template <class E, int NV, int MB, bool kHalf>
void multiply_tile(typename Simd<ComputeOf<E>>::V* out, Operand<E> a, int64_t depth, const E* panel, bool add) {
  using V = typename Simd<ComputeOf<E>>::V;
  constexpr int kFull = Sums<ComputeOf<E>, NV, MB, kHalf>::kFull;
  constexpr int kStep = kPair<E>;
  constexpr int64_t kPanelStep = int64_t(NV) * Simd<ComputeOf<E>>::kLanes * kStep;
  constexpr int kChains = TileSize::chains(MB, NV);
  static_assert(MB * NV * kChains <= TileSize::kAccumulators);
  int64_t k = 0;
  do {
    const int64_t end = std::min(depth, k + kChainDepth);
    const bool first = k == 0 && !add;
    Sums<ComputeOf<E>, NV, MB, kHalf> sums[kChains];
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 16
      for (int m = 0; m < MB; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < kFull; ++v) sums[chain].full[m][v] = V{};
        if constexpr (kHalf) sums[chain].half[m] = typename Simd<ComputeOf<E>>::Half{};
      }
    for (; k + kChains * kStep <= end; k += kChains * kStep, panel += kChains * kPanelStep) {
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain)
        multiply_add<E, NV, MB, kHalf>(sums[chain], a, k + chain * kStep, panel + chain * kPanelStep);
    }
    if (k < end) multiply_add<E, NV, MB, kHalf>(sums[0], a, k, panel);  // the odd one of the last segment
    k = end;
#pragma GCC unroll 16
    for (int m = 0; m < MB; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const V sum = kChains == 2 ? sums[0].at(m, v) + sums[kChains - 1].at(m, v) : sums[0].at(m, v);
        out[m * NV + v] = first ? sum : out[m * NV + v] + sum;
      }
  } while (k < depth);
}

template <class E, int NV, bool kHalf, int... kIndex>
void multiply_rows(typename Simd<ComputeOf<E>>::V* out, int rows, Operand<E> a, int64_t depth, const E* panel, bool add,
                   std::integer_sequence<int, kIndex...>) {
  ((rows == kIndex + 1 ? multiply_tile<E, NV, kIndex + 1, kHalf>(out, a, depth, panel, add) : void()), ...);
}

template <class E, int NV>
void multiply_vectors(typename Simd<ComputeOf<E>>::V* out, [[maybe_unused]] bool half, int rows, Operand<E> a,
                      int64_t depth, const E* panel, bool add) {
  constexpr std::make_integer_sequence<int, TileSize::rows(NV)> kRows;
#if defined(__AVX512F__)
  if (half) return multiply_rows<E, NV, true>(out, rows, a, depth, panel, add, kRows);
#endif
  multiply_rows<E, NV, false>(out, rows, a, depth, panel, add, kRows);
}

// out[rows][vectors] = A[rows, depth] * panel. `add`: the product is added to `out`.
template <class E>
void multiply(typename Simd<ComputeOf<E>>::V* out, PanelWidth width, int rows, Operand<E> a, int64_t depth,
              const E* panel, bool add = false) {
  switch (width.vectors) {
    case 1:
      return multiply_vectors<E, 1>(out, width.half, rows, a, depth, panel, add);
    case 2:
      return multiply_vectors<E, 2>(out, width.half, rows, a, depth, panel, add);
    case 3:
      return multiply_vectors<E, 3>(out, width.half, rows, a, depth, panel, add);
    case 4:
      return multiply_vectors<E, 4>(out, width.half, rows, a, depth, panel, add);
  }
}
