// Packed weights: every element lies where the tile product reads it, and the rest is zero.
#include "typed.h"

namespace rnnfast::RNNFAST_ISA {

template <class E>
struct Panels : ::testing::Test {
  static constexpr int kLanes = PanelShape<E>::kLanes;

  // The element of column `lane` of vector `v`, at k.
  static float at(const E* panel, const PanelShape<E>& shape, int64_t block, int64_t k, int v, int lane) {
    const int64_t width = shape.width(block), pair = kPair<E>;
    return float(widen(panel[shape.offset(block) + ((k / pair * width + v) * kLanes + lane) * pair + k % pair]));
  }

  // Counts the columns of the weight that are found, and checks them; other columns of the panel must be zero.
  static void check(const PanelShape<E>& shape, const std::vector<E>& weight, const E* panel) {
    int64_t found = 0;
    for (int64_t block = 0; block < shape.blocks(); ++block) {
      const int64_t units = shape.columns_in(block), stride = shape.gates > 1 ? shape.gate_stride(block) : units;
      ASSERT_LE(shape.width(block).vectors, TileSize::kMaxVectors);
      for (int v = 0; v < shape.width(block); ++v)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t gate = (v * kLanes + lane) / stride, unit = (v * kLanes + lane) % stride;
          const bool inside = gate < shape.gates && unit < units;
          const int64_t row = gate * shape.columns + shape.first_column(block) + unit;
          found += inside;
          for (int64_t k = 0; k < shape.padded_depth(); ++k) {
            const bool real = inside && k < shape.depth;
            ASSERT_EQ(at(panel, shape, block, k, v, lane), real ? float(widen(weight[row * shape.depth + k])) : 0.f)
                << "block " << block << " vector " << v << " lane " << lane << " k " << k;
          }
        }
    }
    EXPECT_EQ(found, shape.gates * shape.columns);
  }
};
TYPED_TEST_SUITE(Panels, Elements);

TYPED_TEST(Panels, BlocksCoverTheColumns) {
  for (int gates : {1, 3, 4})
    for (bool dense : {false, true})
      for (int64_t columns = 1; columns < 150; ++columns) {
        const PanelShape<TypeParam> shape{columns, 7, gates, dense};
        int64_t sum = 0;
        for (int64_t block = 0; block < shape.blocks(); ++block) {
          EXPECT_EQ(shape.first_column(block), sum);
          EXPECT_GT(shape.columns_in(block), 0);
          EXPECT_EQ(shape.offset(block + 1) - shape.offset(block),
                    shape.width(block) * shape.kLanes * shape.padded_depth());
          sum += shape.columns_in(block);
        }
        EXPECT_EQ(sum, columns);
      }
}

TYPED_TEST(Panels, PackedWeights) {
  for (int gates : {1, 3, 4})
    for (bool dense : {false, true})
      for (int64_t columns : {1, 3, 8, 15, 16, 17, 33, 70})
        for (int64_t depth : {1, 2, 15, 16, 33, 67}) {
          const PanelShape<TypeParam> shape{columns, depth, gates, dense};
          const std::vector<TypeParam> weight = whole_numbers<TypeParam>(gates * columns * depth, 5);
          Aligned<TypeParam> panel(shape.size());
          pack_panels(panel.data(), shape, weight_of(weight, depth), 0, shape.blocks());
          this->check(shape, weight, panel.data());
          if (this->HasFatalFailure()) return;
          // The same weight, stored by columns.
          std::vector<TypeParam> turned(weight.size());
          for (int64_t row = 0; row < gates * columns; ++row)
            for (int64_t k = 0; k < depth; ++k) turned[k * gates * columns + row] = weight[row * depth + k];
          pack_panels(panel.data(), shape, Weight{turned.data(), 1, gates * columns}, 0, shape.blocks());
          this->check(shape, weight, panel.data());
          if (this->HasFatalFailure()) return;
        }
}

TYPED_TEST(Panels, PackedTransposes) {
  for (int gates : {1, 3, 4})
    for (int leading = 0; leading < gates; ++leading)
      for (int64_t columns : {1, 7, 16, 33, 70})
        for (int64_t size : {1, 16, 35}) {
          const int64_t plane = whole_pairs<TypeParam>(size);
          const PanelShape<TypeParam> shape{columns, gates * plane};
          const std::vector<TypeParam> weight = whole_numbers<TypeParam>(gates * size * columns, 6);
          // What the panel means: column c has the weight's rows, each gate padded to whole pairs.
          std::vector<TypeParam> wanted(columns * gates * plane, TypeParam{});
          for (int gate = 0; gate < gates; ++gate)
            for (int64_t row = 0; row < size; ++row)
              for (int64_t c = 0; c < columns; ++c)
                wanted[c * gates * plane + gate * plane + row] =
                    weight[((gate + leading) % gates * size + row) * columns + c];
          Aligned<TypeParam> panel(shape.size());
          pack_transposed(panel.data(), shape, weight_of(weight, columns), gates, size, leading, 0, shape.blocks());
          this->check(shape, wanted, panel.data());
          if (this->HasFatalFailure()) return;
          std::vector<TypeParam> turned(weight.size());
          for (int64_t row = 0; row < gates * size; ++row)
            for (int64_t c = 0; c < columns; ++c) turned[c * gates * size + row] = weight[row * columns + c];
          const Weight by_columns{turned.data(), 1, gates * size};
          pack_transposed(panel.data(), shape, by_columns, gates, size, leading, 0, shape.blocks());
          this->check(shape, wanted, panel.data());
          if (this->HasFatalFailure()) return;
        }
}

TYPED_TEST(Panels, Transpose) {
  using T = ComputeOf<TypeParam>;
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V rows[kLanes];
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < kLanes; ++lane) rows[i][lane] = T(i * 100 + lane);
  transpose<T>(rows);
  for (int i = 0; i < kLanes; ++i)
    for (int lane = 0; lane < kLanes; ++lane) EXPECT_EQ(rows[i][lane], T(lane * 100 + i));
}

}  // namespace rnnfast::RNNFAST_ISA
