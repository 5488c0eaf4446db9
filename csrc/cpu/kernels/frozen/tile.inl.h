// Products of frozen weights: a register tile of rows and vectors, streamed over a packed panel.
//
// A block of a panel has up to 4 vectors of 16 lanes (cpu/frozen.h). An instruction set with shorter vectors walks over
// a block in parts, each with its own lanes of every vector. The panel of a block then comes from L1 or L2.

constexpr int kFrozenParts = int(kPackedLanes * 4 / RNNFAST_VECTOR_BYTES);
constexpr int64_t kVectorBytes = kPackedLanes * 4;
// Sums of a tile: those that a kernel of plain panels takes (gemm.inl.h).
constexpr int kFrozenSums = TileSize::kAccumulators;
// 16-bit activations take two sums a row and vector.
constexpr int frozen_tile_rows(int vectors, int terms) {
  return std::min(kFrozenSums / (vectors * terms), TileSize::kMaxRows);
}

// out[row][vector][lane] = sum over k of a[row][k] * W[vector, lane][k].
template <class F, int kVectors, int kRows, int kTerms>
void frozen_tile(float* out, int64_t out_stride, const PackedMatrix& matrix, int64_t position, ActivationRows a) {
  using S = Simd<float>;
  using Sum = typename F::Sum;
  constexpr bool kInt8 = F::kFormat == WeightFormat::kInt8;
  // Few sums cannot cover the latency of a multiply (4 cycles, 2 a cycle): then two chains over k.
  constexpr int kChains = kRows * kVectors * kTerms <= 8 && kRows * kVectors * kTerms * 2 <= kFrozenSums ? 2 : 1;
  constexpr int64_t kStepBytes = kVectors * kVectorBytes,
                    kActivationBytes = F::kBytes * (kInt8                                   ? 4
                                                    : F::kFormat == WeightFormat::kBFloat16 ? 2
                                                                                            : 1);
  const int64_t steps = matrix.shape.steps();
#pragma GCC unroll 1
  for (int part = 0; part < kFrozenParts; ++part) {
    Sum sums[kChains][kTerms][kRows][kVectors];
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 2
      for (int term = 0; term < kTerms; ++term)
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sums[chain][term][m][v] = Sum{};
    const char* panel = matrix.panel + position * steps * kVectorBytes + part * RNNFAST_VECTOR_BYTES;
    const char* from = a.data;
    const auto step = [&](auto& into, const char* panel, const char* from) __attribute__((always_inline)) {
      typename F::Weights weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        weight[v] = F::load(panel + v * kVectorBytes);
#if defined(__AVX512F__)
        // Keeps the weight in its register. GCC 12 would load it again for every row (4 rows: 0.70 of the peak, not
        // 0.94).
        if constexpr (kRows * kTerms > 1 && kRows * kVectors * kTerms <= 16 && sizeof(weight[v]) == 64)
          asm("" : "+v"(weight[v]));
#endif
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
        for (int term = 0; term < kTerms; ++term) {
          const auto activation = F::broadcast(from + m * a.row_bytes + term * a.plane_bytes);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) F::multiply_add(into[term][m][v], activation, weight[v]);
        }
    };
    int64_t k = 0;
    for (; k + kChains <= steps; k += kChains, from += kChains * kActivationBytes, panel += kChains * kStepBytes) {
      step(sums[0], panel, from);
      if constexpr (kChains == 2) step(sums[1], panel + kStepBytes, from + kActivationBytes);
    }
    if (k < steps) step(sums[0], panel, from);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = (position + v) * kPackedLanes + part * S::kLanes;
      [[maybe_unused]] Sum column_sum{};
      [[maybe_unused]] S::V column_scale{};
      if constexpr (kInt8) {
        std::memcpy(&column_sum, matrix.sum + column, sizeof column_sum);
        column_scale = S::load(matrix.scale + column);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        S::V value{};
#pragma GCC unroll 2
        for (int term = 0; term < kTerms; ++term) {
          Sum sum = sums[0][term][m][v];
          if constexpr (kChains == 2) sum += sums[1][term][m][v];
          if constexpr (kInt8) {
            sum -= (a.scale[m].zero[term] - kActivationOffset<F>)*column_sum;
            const S::V part_value = __builtin_convertvector(sum, S::V);
            value = kTerms == 2 && term == 1 ? value * S::set(256) + part_value : part_value;
          } else {
            value = sum;
          }
        }
        if constexpr (kInt8) value = value * (column_scale * S::set(a.scale[m].scale));
        S::store(out + m * out_stride + v * kPackedLanes + part * S::kLanes, value);
      }
    }
  }
}

template <class F, int kVectors, int kTerms, int... kIndex>
void frozen_rows(int rows, float* out, int64_t out_stride, const PackedMatrix& matrix, int64_t position,
                 ActivationRows a, std::integer_sequence<int, kIndex...>) {
  ((rows == kIndex + 1 ? frozen_tile<F, kVectors, kIndex + 1, kTerms>(out, out_stride, matrix, position, a) : void()),
   ...);
}

// One block of a matrix times `rows` rows, at most frozen_tile_rows of them.
template <class F, int kTerms>
void frozen_block_terms(int rows, float* out, int64_t out_stride, const PackedMatrix& matrix, int64_t block,
                        ActivationRows a) {
  const int64_t position = matrix.shape.position(block);
  const auto run = [&]<int kVectors>() {
    frozen_rows<F, kVectors, kTerms>(rows, out, out_stride, matrix, position, a,
                                     std::make_integer_sequence<int, frozen_tile_rows(kVectors, kTerms)>());
  };
  switch (matrix.shape.width(block)) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    default:
      return run.template operator()<4>();
  }
}

// Any number of rows. Row m of the result goes to out + m * out_stride.
template <class F>
void frozen_block(int64_t rows, float* out, int64_t out_stride, const PackedMatrix& matrix, int64_t block,
                  ActivationRows a, bool wide) {
  const int terms = wide ? 2 : 1;
  for_row_tiles(rows, frozen_tile_rows(matrix.shape.width(block), terms), [&](int64_t first, int count) {
    const ActivationRows own{a.data + first * a.row_bytes, a.row_bytes, a.plane_bytes, a.scale + first};
    if constexpr (F::kFormat == WeightFormat::kInt8)
      if (wide) return frozen_block_terms<F, 2>(count, out + first * out_stride, out_stride, matrix, block, own);
    frozen_block_terms<F, 1>(count, out + first * out_stride, out_stride, matrix, block, own);
  });
}
