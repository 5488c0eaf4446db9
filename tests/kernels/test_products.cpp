// The tile product in its packed and its direct form: exact on whole numbers, within the bound of rounding otherwise.
#include "typed.h"

namespace rnnfast::RNNFAST_ISA {

template <class E>
struct Products : ::testing::Test {
  using C = ComputeOf<E>;
  using V = typename Simd<C>::V;
  static constexpr int kLanes = Simd<C>::kLanes;

  // A [rows, depth] W^T for one block that has all columns of W [columns, depth].
  struct Case {
    int rows;
    PanelShape<E> shape;
    std::vector<E> a, weight;
    int64_t stride;

    Case(int rows, int64_t columns, int64_t depth, bool whole)
        : rows(rows), shape{columns, depth}, stride(whole_pairs<E>(depth) + 2 * kPair<E>) {
      a = whole ? whole_numbers<E>(rows * stride, 1) : normal_numbers<E>(rows * stride, 1);
      weight = whole ? whole_numbers<E>(columns * depth, 2) : normal_numbers<E>(columns * depth, 2);
      for (int row = 0; row < rows; ++row)
        for (int64_t k = depth; k < whole_pairs<E>(depth); ++k) a[row * stride + k] = E{};
    }
    Operand<E> operand() const { return {a.data(), stride}; }
    double exact(int row, int64_t column, bool magnitudes = false) const {
      double sum = 0;
      for (int64_t k = 0; k < shape.depth; ++k) {
        const double term = double(widen(a[row * stride + k])) * widen(weight[column * shape.depth + k]);
        sum += magnitudes ? std::abs(term) : term;
      }
      return sum;
    }
  };

  static std::vector<V> packed(const Case& one, bool add = false) {
    Aligned<E> panel(one.shape.size());
    pack_panels(panel.data(), one.shape, weight_of(one.weight, one.shape.depth), 0, 1);
    std::vector<V> out(TileSize::kAccumulators, Simd<C>::set(add ? C(3) : C(0)));
    multiply<E>(out.data(), one.shape.width(0), one.rows, one.operand(), one.shape.padded_depth(), panel.data(), add);
    return out;
  }

  static std::vector<V> direct(const Case& one) {
    std::vector<V> out(one.rows * one.shape.width(0).vectors);
    multiply_direct<E>(out.data(), one.shape, 0, one.rows, one.operand(), weight_of(one.weight, one.shape.depth));
    return out;
  }

  static C value(const std::vector<V>& out, const Case& one, int row, int64_t column) {
    return out[row * one.shape.width(0).vectors + column / kLanes][column % kLanes];
  }

  // Every size of a tile, with a full, an almost full and a half last vector.
  template <class Body>
  static void for_all_tiles(Body&& body) {
    for (int vectors = 1; vectors <= TileSize::kMaxVectors; ++vectors)
      for (int rows = 1; rows <= TileSize::rows(vectors); ++rows)
        for (int missing : {0, 1, kLanes / 2}) body(rows, int64_t(vectors) * kLanes - missing);
  }
};
TYPED_TEST_SUITE(Products, Elements);

TYPED_TEST(Products, TheTileFitsIntoTheRegisters) {
  for (int vectors = 1; vectors <= TileSize::kMaxVectors; ++vectors) {
    EXPECT_GE(TileSize::rows(vectors), 1);
    for (int rows = 1; rows <= TileSize::rows(vectors); ++rows)
      EXPECT_LE(rows * vectors * TileSize::chains(rows, vectors), TileSize::kAccumulators);
  }
  EXPECT_LT(TileSize::kAccumulators, RNNFAST_VECTOR_REGISTERS);
}

TYPED_TEST(Products, PackedIsExactOnWholeNumbers) {
  TestFixture::for_all_tiles([](int rows, int64_t columns) {
    for (int64_t depth : {1, 2, 3, 31, 255, 256, 257, 258, 600}) {
      const typename TestFixture::Case one(rows, columns, depth, true);
      for (bool add : {false, true}) {
        const auto out = TestFixture::packed(one, add);
        for (int row = 0; row < rows; ++row)
          for (int64_t column = 0; column < columns; ++column)
            ASSERT_EQ(TestFixture::value(out, one, row, column), one.exact(row, column) + (add ? 3 : 0))
                << rows << " rows, " << columns << " columns, depth " << depth;
      }
    }
  });
}

TYPED_TEST(Products, DirectIsExactOnWholeNumbers) {
  TestFixture::for_all_tiles([](int rows, int64_t columns) {
    for (int64_t depth : {1, 2, 3, 31, 33, 257}) {
      const typename TestFixture::Case one(rows, columns, depth, true);
      const auto out = TestFixture::direct(one);
      for (int row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
          ASSERT_EQ(TestFixture::value(out, one, row, column), one.exact(row, column))
              << rows << " rows, " << columns << " columns, depth " << depth;
    }
  });
}

// |error| <= (additions in a chain) * eps / 2 * sum |a w|, whatever the order within the chain.
TYPED_TEST(Products, RoundingStaysWithinTheChains) {
  using C = ComputeOf<TypeParam>;
  if (sizeof(C) == 8) GTEST_SKIP() << "the reference is float64";
  for (int64_t depth : {31, 256, 700}) {
    const typename TestFixture::Case one(TileSize::rows(2), 2 * TestFixture::kLanes, depth, false);
    const double chain = double(std::min(depth, kChainDepth) + ceil_div(depth, kChainDepth) + 2);
    const auto packed = TestFixture::packed(one), direct = TestFixture::direct(one);
    for (int row = 0; row < one.rows; ++row)
      for (int64_t column = 0; column < one.shape.columns; ++column) {
        const double bound = chain * std::numeric_limits<C>::epsilon() / 2 * one.exact(row, column, true);
        EXPECT_NEAR(TestFixture::value(packed, one, row, column), one.exact(row, column), bound);
        EXPECT_NEAR(TestFixture::value(direct, one, row, column), one.exact(row, column), bound);
      }
  }
}

TYPED_TEST(Products, GatePanelsGiveTheGatesOfTheirUnits) {
  using C = ComputeOf<TypeParam>;
  constexpr int kLanes = Simd<C>::kLanes;
  for (int gates : {3, 4})
    for (bool dense : {false, true})
      for (int64_t units : {1, 5, 16, 19, 40}) {
        const int64_t depth = 24;
        const PanelShape<TypeParam> shape{units, depth, gates, dense};
        const auto a = whole_numbers<TypeParam>(depth, 3), weight = whole_numbers<TypeParam>(gates * units * depth, 4);
        Aligned<TypeParam> panel(shape.size());
        pack_panels(panel.data(), shape, weight_of(weight, depth), 0, shape.blocks());
        for (int64_t block = 0; block < shape.blocks(); ++block) {
          C out[TileSize::kMaxVectors * kLanes];
          typename TestFixture::V vectors[TileSize::kAccumulators];
          multiply<TypeParam>(vectors, shape.width(block), 1, {a.data(), depth}, depth,
                              panel.data() + shape.offset(block));
          std::memcpy(out, vectors, shape.width(block) * sizeof vectors[0]);
          for (int gate = 0; gate < gates; ++gate)
            for (int64_t unit = 0; unit < shape.columns_in(block); ++unit) {
              double sum = 0;
              const int64_t row = gate * units + shape.first_column(block) + unit;
              for (int64_t k = 0; k < depth; ++k) sum += double(widen(a[k])) * widen(weight[row * depth + k]);
              ASSERT_EQ(out[gate * shape.gate_stride(block) + unit], sum);
            }
        }
      }
}

TYPED_TEST(Products, LaneSums) {
  using T = ComputeOf<TypeParam>;
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V vectors[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < kLanes; ++lane) vectors[i][lane] = T(i * 3 + lane);
  const auto sums = lane_sums<T>(vectors);
  for (int i = 0; i < kLanes; ++i) EXPECT_EQ(sums[i], T(i * 3 * kLanes + kLanes * (kLanes - 1) / 2));
}

TEST(RowTiles, CoverAllRowsInEvenGroups) {
  for (int limit = 1; limit <= 8; ++limit)
    for (int64_t rows = 0; rows < 50; ++rows) {
      int64_t next = 0;
      int smallest = 100, largest = 0;
      for_row_tiles(rows, limit, [&](int64_t first, int count) {
        EXPECT_EQ(first, next);
        next += count;
        smallest = std::min(smallest, count);
        largest = std::max(largest, count);
      });
      EXPECT_EQ(next, rows);
      EXPECT_LE(largest, limit);
      EXPECT_LE(rows > 0 ? largest - smallest : 0, 1);
    }
}

}  // namespace rnnfast::RNNFAST_ISA
