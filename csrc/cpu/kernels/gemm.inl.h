// The matrix products of the CPU kernels: register tiles over packed weight panels.
//
// A panel holds `vectors` SIMD vectors of columns for every k: [k][vector][lane], so a tile streams it front to back.
//   plain panels   consecutive columns, up to kMaxVectors vectors a block (RNN, projection, every backward product)
//   gate panels    one vector of units a block, its gates side by side (GRU: 3, LSTM: 4), so a tile ends with all gates
//   of
//                  its units in registers and applies the activations there
// A tile is MB rows x NV vectors of accumulators, NV vectors of weights and one broadcast element of A; NV * MB is
// chosen to fill the register file without spilling (24 accumulators of 32 registers, 12 of 16; measured on Zen 4).
// bfloat16 panels hold pairs of k: [k / 2][vector][lane][2], the operand order of dpbf16ps.

#if RNNFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 8;
constexpr int tile_rows(int vectors) { return std::min(kAccumulators / vectors, kMaxRows); }

template <class T>
constexpr int kPair = 1;  // elements of k that one multiply consumes
template <>
inline constexpr int kPair<BFloat16> = 2;

template <class E>
using ComputeOf = std::conditional_t<std::is_same_v<E, BFloat16>, float, E>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class E>
int64_t whole_pairs(int64_t count) {
  return ceil_div(count, kPair<E>) * kPair<E>;
}

inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat16* to) {  // to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Loads and stores of storage elements as compute vectors.
template <class E>
struct Io {
  using S = Simd<E>;
  using V = typename S::V;
  static RNNFAST_INLINE V load(const E* p) { return S::load(p); }
  static RNNFAST_INLINE V load_first(const E* p, int count) { return S::load_first(p, count); }
  static RNNFAST_INLINE void store(E* p, V v) { S::store(p, v); }
  static RNNFAST_INLINE void store_first(E* p, V v, int count) { S::store_first(p, v, count); }
};

// `count` elements, which is known to be a whole vector where kFull.
template <bool kFull, class T>
RNNFAST_INLINE auto load_part(const T* p, [[maybe_unused]] int count) {
  return kFull ? Io<T>::load(p) : Io<T>::load_first(p, count);
}
template <bool kFull, class T, class V>
RNNFAST_INLINE void store_part(T* p, V value, [[maybe_unused]] int count) {
  kFull ? Io<T>::store(p, value) : Io<T>::store_first(p, value, count);
}

#if defined(__AVX512BF16__)
template <>
struct Io<BFloat16> {
  using V = Simd<float>::V;
  static RNNFAST_INLINE V load(const BFloat16* p) {
    return (V)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static RNNFAST_INLINE V load_first(const BFloat16* p, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
    return (V)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static RNNFAST_INLINE void store(BFloat16* p, V v) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
  static RNNFAST_INLINE void store_first(BFloat16* p, V v, int count) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
  }
};
#endif

// to[i] = {even[i], odd[i]} for the first `count` i of a vector, zero behind them; odd null: zero.
#if defined(__AVX512BF16__)
RNNFAST_INLINE void interleave(BFloat16* to, const BFloat16* even, const BFloat16* odd, int count) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? mask : 0, odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// Runs body(first row, rows) over `rows` rows in nearly equal groups of at most `limit`: a last group of one row would
// run at the speed of the weight stream.
template <class Body>
RNNFAST_INLINE void for_row_tiles(int64_t rows, int limit, Body&& body) {
  const int64_t groups = ceil_div(rows, limit);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * rows / groups;
    body(first, int((group + 1) * rows / groups - first));
  }
}

// A[row, k] = data[row * row_stride + k * k_stride], and for bfloat16 so for even k, with the odd k right behind it.
template <class E>
struct Operand {
  const E* data;
  int64_t row_stride;
  int64_t k_stride = 1;
  RNNFAST_INLINE Operand from_row(int64_t row) const { return {data + row * row_stride, row_stride, k_stride}; }
};

// The sums of a tile of MB rows and NV vectors, of which the last one is half as long with kHalf.
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
      else if constexpr (kHalf)  // so that the multiply itself broadcasts from memory
        sums.half[m] += (value - typename S::Half{}) * S::low_half(weight[kFull]);
    }
  }
}

// Longest chain of additions into one register: a sum of thousands in a single chain would round worse than torch's.
constexpr int64_t kChainDepth = 256;

// out[MB][NV] = A[MB rows, depth] * panel, or with `add` is increased by it. Few accumulators cannot cover the latency
// of fma (4 cycles, 2 a cycle), so small tiles run two chains over k; with
// 16 registers only those of one row, or rounding would depend on where threads cut the tiles of a weight gradient.
// bfloat16: depth is even (operands are zero-padded).
template <class E, int NV, int MB, bool kHalf>
void multiply_tile(typename Simd<ComputeOf<E>>::V* out, Operand<E> a, int64_t depth, const E* panel, bool add) {
  using V = typename Simd<ComputeOf<E>>::V;
  constexpr int kFull = Sums<ComputeOf<E>, NV, MB, kHalf>::kFull;
  constexpr int kStep = kPair<E>;
  constexpr int64_t kPanelStep = int64_t(NV) * Simd<ComputeOf<E>>::kLanes * kStep;
  constexpr int kChains = MB * NV <= 8 && MB * NV * 2 <= kAccumulators && (kAccumulators == 24 || MB == 1) ? 2 : 1;
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
    if (k < end)
      multiply_add<E, NV, MB, kHalf>(sums[0], a, k, panel);  // the odd one; only the last stretch can have it
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
  constexpr std::make_integer_sequence<int, tile_rows(NV)> kRows;
#if defined(__AVX512F__)
  if (half) return multiply_rows<E, NV, true>(out, rows, a, depth, panel, add, kRows);
#endif
  multiply_rows<E, NV, false>(out, rows, a, depth, panel, add, kRows);
}

// Vectors of a panel block; `half`: columns stand in the lower half of the last one only, which costs half the time
// where 64 byte vectors take two passes (Zen 4).
struct PanelWidth {
  int vectors;
  bool half;
  operator int() const { return vectors; }
};

// out[rows][vectors] = A[rows, depth] * panel, rows <= tile_rows(vectors), vectors <= kMaxVectors. Every product of the
// kernels goes through here; what follows it (activations, gradients) works on `out`, a few cache lines on the stack.
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

// How `columns` columns are cut into panel blocks. gates > 1: gate panels of one vector of units each; where H is no
// multiple of kLanes the last block's few units stand `dense`, gate after gate without gaps, if that saves a vector.
template <class E>
struct PanelShape {
  static constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  int64_t columns;  // units, when gates > 1
  int64_t depth;    // k
  int gates = 1;
  bool dense = false;

  int64_t padded_depth() const { return whole_pairs<E>(depth); }
  int64_t column_vectors() const { return ceil_div(columns, kLanes); }
  int64_t blocks() const { return gates > 1 ? column_vectors() : ceil_div(column_vectors(), kMaxVectors); }
  // First vector of columns of a block; blocks are cut evenly (5 vectors: 3 + 2).
  int64_t first_vector(int64_t block) const { return block * column_vectors() / blocks(); }
  int64_t first_column(int64_t block) const { return first_vector(block) * kLanes; }
  int64_t columns_in(int64_t block) const { return std::min(first_column(block + 1), columns) - first_column(block); }
  // Elements from one gate of a block to the next.
  int gate_stride(int64_t block) const {
    const int units = int(columns_in(block));
    return dense && ceil_div(units * gates, kLanes) < gates ? units : kLanes;
  }
  PanelWidth width(int64_t block) const {
    const int64_t columns = gates == 1 ? columns_in(block) : gate_stride(block) * gates;
    const int64_t vectors = ceil_div(columns, kLanes);
    return {int(vectors), vectors * kLanes - columns >= kLanes / 2};
  }
  // Elements, per k, of the panels before a block; all, at blocks().
  int64_t position(int64_t block) const {
    if (gates == 1 || block == 0) return first_column(block);
    return first_column(block - 1) * gates + width(block - 1) * kLanes;
  }
  int64_t offset(int64_t block) const { return position(block) * padded_depth(); }
  int64_t size() const { return offset(blocks()); }
};

// Turns kLanes rows of kLanes elements into columns: log2(kLanes) rounds of interleaving row i with row i + kLanes / 2.
template <class T>
RNNFAST_INLINE void transpose(typename Simd<T>::V (&rows)[Simd<T>::kLanes]) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  using B = typename S::B;
  B low{}, high{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * kLanes;
    high[lane] = lane / 2 + kLanes / 2 + (lane % 2) * kLanes;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    typename S::V next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// The weight's columns that one vector of a panel holds; null: zeros.
template <class E>
struct Columns {
  static constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  const E* at[kLanes];
  bool full = true;  // no null
};

// dst[k * stride + lane] = column[lane][k * k_stride] for all k.
template <class E>
void pack_vector(E* dst, int64_t stride, const Columns<E>& column, int64_t k_stride, int64_t depth) {
  using V = typename Simd<ComputeOf<E>>::V;
  constexpr int kLanes = Simd<ComputeOf<E>>::kLanes;
  constexpr int kStep = kPair<E>;
  int64_t k = 0;
  // A pair of bfloat16 has the size of a float, so pairs are transposed as floats are.
  for (; k_stride == 1 && k + kLanes * kStep <= depth; k += kLanes * kStep) {
    V rows[kLanes] = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!column.full && !column.at[lane]) continue;
      // The next vector's columns: the hardware loses track of as many streams at every page.
      if (column.full) __builtin_prefetch(column.at[lane] + kLanes * (column.at[1] - column.at[0]) + k);
      std::memcpy(&rows[lane], column.at[lane] + k, sizeof rows[lane]);
    }
    transpose<ComputeOf<E>>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) std::memcpy(dst + (k / kStep + i) * stride, &rows[i], sizeof rows[i]);
  }
  for (; k < depth; ++k) {
    E* out = dst + k / kStep * stride + k % kStep;
    for (int lane = 0; lane < kLanes; ++lane) out[lane * kStep] = column.at[lane] ? column.at[lane][k * k_stride] : E{};
  }
  if (depth % kStep)
    for (int lane = 0; lane < kLanes; ++lane) dst[depth / kStep * stride + lane * kStep + 1] = E{};
}

// The same where the columns, `count` of them, lie side by side.
template <class E>
void pack_adjacent(E* dst, int64_t stride, const E* src, int64_t k_stride, int64_t depth, int count) {
  using S = Simd<ComputeOf<E>>;
  if constexpr (kPair<E> == 2) {
    for (int64_t k = 0; k < depth; k += 2)
      interleave(dst + k / 2 * stride, src + k * k_stride, k + 1 < depth ? src + (k + 1) * k_stride : nullptr, count);
  } else if (count == S::kLanes) {
    for (int64_t k = 0; k < depth; ++k) S::store(dst + k * stride, S::load(src + k * k_stride));
  } else {
    for (int64_t k = 0; k < depth; ++k) S::store(dst + k * stride, S::load_first(src + k * k_stride, count));
  }
}

// Packs the blocks [first, last) of a weight [gates * columns, depth].
template <class E>
void pack_panels(E* dst, const PanelShape<E>& shape, const Weight& weight, int64_t first, int64_t last) {
  constexpr int kLanes = PanelShape<E>::kLanes;
  for (int64_t block = first; block < last; ++block) {
    const int width = shape.width(block);
    const int64_t units = shape.columns_in(block), gate_stride = shape.gates > 1 ? shape.gate_stride(block) : units;
    const int64_t stride = int64_t(width) * kLanes * kPair<E>;
    for (int v = 0; v < width; ++v) {
      Columns<E> column;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t gate = (v * kLanes + lane) / gate_stride, unit = (v * kLanes + lane) % gate_stride;
        const bool inside = gate < shape.gates && unit < units;
        const int64_t row = gate * shape.columns + shape.first_column(block) + unit;
        column.at[lane] = inside ? static_cast<const E*>(weight.data) + row * weight.row_stride : nullptr;
        column.full = column.full && inside;
      }
      E* out = dst + shape.offset(block) + int64_t(v) * kLanes * kPair<E>;
      pack_vector<E>(out, stride, column, weight.column_stride, shape.depth);
    }
  }
}

// Packs the blocks [first, last) of the transpose of a weight [gates * size, columns]: k are its rows, gate `leading`
// first and each gate padded to whole pairs.
template <class E>
void pack_transposed(E* dst, const PanelShape<E>& shape, const Weight& weight, int gates, int64_t size, int leading,
                     int64_t first, int64_t last) {
  constexpr int kLanes = PanelShape<E>::kLanes;
  for (int64_t block = first; block < last; ++block) {
    const int64_t stride = int64_t(shape.width(block)) * kLanes * kPair<E>;
    for (int v = 0; v < shape.width(block); ++v) {
      const int64_t first_column = shape.first_column(block) + v * kLanes;
      const int count = int(std::min<int64_t>(kLanes, shape.columns - first_column));
      E* out = dst + shape.offset(block) + int64_t(v) * kLanes * kPair<E>;
      for (int gate = 0; gate < gates; ++gate, out += ceil_div(size, kPair<E>) * stride) {
        const int64_t row = (gate + leading) % gates * size;
        const E* src =
            static_cast<const E*>(weight.data) + row * weight.row_stride + first_column * weight.column_stride;
        if (weight.column_stride == 1) {
          pack_adjacent<E>(out, stride, src, weight.row_stride, size, count);
          continue;
        }
        Columns<E> column{{}, count == kLanes};
        for (int lane = 0; lane < count; ++lane) column.at[lane] = src + lane * weight.column_stride;
        pack_vector<E>(out, stride, column, weight.row_stride, size);
      }
    }
  }
}
