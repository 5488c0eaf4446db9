// Sums of outer products, the gradients of weights and biases: exact on whole numbers, for every cut into shares.
#include "typed.h"

namespace rnnfast::RNNFAST_ISA {

template <class E>
struct OuterSums : ::testing::Test {
  using C = ComputeOf<E>;

  // Two weights of different widths and one bias, from `planes` planes of gate gradients.
  struct Problem {
    int planes = 4;
    int64_t rows, hidden, plane, columns[2];
    std::vector<E> left, right[2];

    Problem(int64_t rows, int64_t hidden, int64_t first, int64_t second)
        : rows(rows), hidden(hidden), plane(whole_pairs<E>(hidden)), columns{first, second} {
      left = whole_numbers<E>(rows * planes * plane + TileSize::kMaxRows, 1);
      for (int i = 0; i < 2; ++i) right[i] = whole_numbers<E>(rows * columns[i] + 64, 2 + i);
    }
    double exact(int which, int chosen, int64_t unit, int64_t column) const {
      double sum = 0;
      for (int64_t row = 0; row < rows; ++row)
        sum += double(widen(left[(row * planes + chosen) * plane + unit])) *
               (which < 0 ? 1 : widen(right[which][row * columns[which] + column]));
      return sum;
    }
  };

  // As a backward pass does it: shares from the last rows to the first.
  static void check(const Problem& problem, Range units, int shares) {
    static constexpr int kPlanes[2][3] = {{1, 2, 0}, {1, 2, 3}};
    constexpr int kGates = 3;
    const int64_t count = units.last - units.first;
    const int64_t elements = kGates * count * (problem.columns[0] + problem.columns[1]);
    Aligned<E> packed(OuterSum<E>::packed_size(problem.planes, count));
    Aligned<C> sums(OuterSum<E>::sums_size(problem.planes, count, elements, problem.rows));
    std::vector<E> out[2], bias(kGates * problem.hidden);
    for (int i = 0; i < 2; ++i) out[i].resize(kGates * problem.hidden * problem.columns[i]);
    for (int share = shares - 1; share >= 0; --share) {
      const Range rows = part_of(problem.rows, share, shares);
      const typename OuterSum<E>::Left left{problem.left.data() + rows.first * problem.planes * problem.plane,
                                            problem.planes, problem.hidden, problem.plane,
                                            problem.planes * problem.plane};
      const OuterSum<E> sum(left, units, {packed.data(), sums.data()});
      const auto x = [&](int64_t row) { return problem.right[0].data() + (rows.first + row) * problem.columns[0]; };
      const auto h = [&](int64_t row) { return problem.right[1].data() + (rows.first + row) * problem.columns[1]; };
      sum.add({rows.last - rows.first, share == shares - 1, share == 0},
              WeightGradient{out[0].data(), kPlanes[0], kGates, problem.columns[0], x},
              WeightGradient{out[1].data(), kPlanes[1], kGates, problem.columns[1], h});
      if (share == 0) sum.totals(bias.data(), kPlanes[0], kGates);
    }
    for (int gate = 0; gate < kGates; ++gate)
      for (int64_t unit = units.first; unit < units.last; ++unit) {
        const int64_t row = gate * problem.hidden + unit;
        expect(bias[row], problem.exact(-1, kPlanes[0][gate], unit, 0));
        for (int i = 0; i < 2; ++i)
          for (int64_t column = 0; column < problem.columns[i]; ++column)
            expect(out[i][row * problem.columns[i] + column], problem.exact(i, kPlanes[i][gate], unit, column));
        if (::testing::Test::HasFailure()) return;
      }
  }

  static void expect(E got, double exact) {
    E want;
    narrow(exact, &want);
    EXPECT_EQ(widen(got), widen(want));
  }
};
TYPED_TEST_SUITE(OuterSums, Elements);

TYPED_TEST(OuterSums, OddSizes) {
  for (int64_t rows : {1, 2, 17, 255, 256, 300}) TestFixture::check({rows, 13, 5, 35}, {0, 13}, 1);
}

TYPED_TEST(OuterSums, PartsOfTheUnits) {
  for (int part = 0; part < 3; ++part) TestFixture::check({40, 29, 16, 29}, part_of(29, part, 3), 1);
}

TYPED_TEST(OuterSums, Shares) { TestFixture::check({1100, 6, 20, 6}, {0, 6}, 2); }

TYPED_TEST(OuterSums, SeveralBlocks) { TestFixture::check({2100, 5, 9, 5}, {0, 5}, 1); }

}  // namespace rnnfast::RNNFAST_ISA
