// The activations against the standard library in more precision: errors in ulp, limits, NaN.
#include "typed.h"

#if !defined(RNNFAST_BF16_ONLY)
namespace rnnfast::RNNFAST_ISA {

// float is compared with float64, double with long double.
template <class T>
using More = std::conditional_t<sizeof(T) == 4, double, long double>;

template <class T>
struct Activations : ::testing::Test {
  using S = Simd<T>;
  using V = typename S::V;

  // From tiny to large, both signs.
  static std::vector<T> arguments(double largest) {
    std::vector<T> x;
    for (double magnitude = 1e-6; magnitude < largest; magnitude *= 1.0001)
      for (double sign : {1., -1.}) x.push_back(T(sign * magnitude));
    x.resize(ceil_div(x.size(), S::kLanes) * S::kLanes, T(0.5));
    return x;
  }

  // The largest error, in units of the last place of the exact result.
  template <class Function, class Exact>
  static double worst_ulp(double largest, Function&& function, Exact&& exact) {
    double worst = 0;
    const std::vector<T> x = arguments(largest);
    for (size_t i = 0; i < x.size(); i += S::kLanes) {
      const V y = function(S::load(&x[i]));
      for (int lane = 0; lane < S::kLanes; ++lane) {
        const More<T> want = exact(More<T>(x[i + lane]));
        const T rounded = T(want);
        const T ulp = std::nextafter(std::abs(rounded), std::numeric_limits<T>::infinity()) - std::abs(rounded);
        worst = std::max(worst, double(std::abs(More<T>(y[lane]) - want) / ulp));
      }
    }
    std::printf("    |x| < %g: %.2f ulp\n", largest, worst);
    return worst;
  }
};

using Computed = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Activations, Computed);

// Rounding x log2(e) costs sigmoid a relative error that grows with |x|; the absolute error stays below 1e-7 in float.
TYPED_TEST(Activations, Sigmoid) {
  using S = Simd<TypeParam>;
  const auto computed = [](auto x) { return S::sigmoid(x); };
  const auto exact = [](auto x) { return 1 / (1 + std::exp(-x)); };
  EXPECT_LE(TestFixture::worst_ulp(1, computed, exact), 3);
  EXPECT_LE(TestFixture::worst_ulp(20, computed, exact), 17);
}

TYPED_TEST(Activations, Tanh) {
  using S = Simd<TypeParam>;
  EXPECT_LE(TestFixture::worst_ulp(20, [](auto x) { return S::tanh(x); }, [](auto x) { return std::tanh(x); }), 4);
}

TYPED_TEST(Activations, SigmoidTimesTanh) {
  using S = Simd<TypeParam>;
  const auto computed = [](auto x) { return S::sigmoid_tanh(x, x * S::set(TypeParam(0.5))); };
  const auto exact = [](auto x) { return 1 / (1 + std::exp(-x)) * std::tanh(x / 2); };
  EXPECT_LE(TestFixture::worst_ulp(1, computed, exact), 5);
  EXPECT_LE(TestFixture::worst_ulp(20, computed, exact), 18);
}

TYPED_TEST(Activations, ExponentialOfBaseTwo) {
  using S = Simd<TypeParam>;
  const auto computed = [](auto x) {
    typename S::V p, s;
    S::exp2_parts(x, p, s);
    return s * p + s;
  };
  const double largest = sizeof(TypeParam) == 4 ? 100 : 900;
  EXPECT_LE(TestFixture::worst_ulp(largest, computed, [](auto x) { return std::exp2(x); }), 1.5);
}

TYPED_TEST(Activations, LimitsAndNan) {
  using S = Simd<TypeParam>;
  using Limits = std::numeric_limits<TypeParam>;
  for (const TypeParam large : {Limits::infinity(), Limits::max(), TypeParam(1e4)}) {
    EXPECT_EQ(S::sigmoid(S::set(large))[0], 1);
    EXPECT_LT(std::abs(S::sigmoid(S::set(-large))[0]), TypeParam(1e-27));
    EXPECT_EQ(S::tanh(S::set(large))[0], 1);
    EXPECT_EQ(S::tanh(S::set(-large))[0], -1);
    EXPECT_EQ(S::relu(S::set(large))[0], large);
    EXPECT_EQ(S::relu(S::set(-large))[0], 0);
  }
  EXPECT_EQ(S::sigmoid(S::zero())[0], TypeParam(0.5));
  EXPECT_EQ(S::tanh(S::zero())[0], 0);
  const auto nan = S::set(Limits::quiet_NaN());
  for (const auto result :
       {S::sigmoid(nan), S::tanh(nan), S::relu(nan), S::sigmoid_tanh(nan, S::one()), S::sigmoid_tanh(S::one(), nan)})
    EXPECT_TRUE(std::isnan(result[0]));
}

}  // namespace rnnfast::RNNFAST_ISA
#endif
