// Element types: conversions of 16-bit numbers, loads and stores of parts of a vector.
#include "typed.h"

namespace rnnfast::RNNFAST_ISA {

TEST(BFloat16, EveryValueSurvivesWideningAndNarrowing) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = widen(BFloat16{uint16_t(bits)});
    BFloat16 back;
    narrow(wide, &back);
    if (wide != wide)
      EXPECT_NE(widen(back), widen(back)) << bits;
    else
      ASSERT_EQ(back.bits, bits);
  }
}

TEST(BFloat16, NarrowingRoundsToNearestEven) {
  std::mt19937 random(1);
  for (int i = 0; i < 1'000'000; ++i) {
    uint32_t bits = random();
    if (i % 4 == 0) bits = (bits & 0xffff0000) | 0x8000;  // halfway
    float x;
    std::memcpy(&x, &bits, sizeof x);
    if (!(std::abs(x) < 3e38f)) continue;
    BFloat16 rounded;
    narrow(x, &rounded);
    const BFloat16 below{uint16_t(bits >> 16)}, above{uint16_t((bits >> 16) + 1)};
    const double down = std::abs(double(x) - widen(below)), up = std::abs(double(widen(above)) - x);
    const bool is_even = (below.bits & 1) == 0;
    ASSERT_EQ(rounded.bits, down < up || (down == up && is_even) ? below.bits : above.bits) << x;
  }
}

#if defined(__AVX512BF16__)
// Vectors flush denormal numbers to zero, as dpbf16ps does.
TEST(BFloat16, VectorsConvertAsSingleNumbers) {
  constexpr int kLanes = Simd<float>::kLanes;
  std::mt19937 random(2);
  for (int i = 0; i < 100'000; ++i) {
    float wide[kLanes];
    for (float& x : wide) {
      const uint32_t bits = random();
      std::memcpy(&x, &bits, sizeof x);
      if (!std::isnormal(x)) x = 0;
    }
    BFloat16 stored[kLanes], one;
    Io<BFloat16>::store(stored, Simd<float>::load(wide));
    float again[kLanes];
    Simd<float>::store(again, Io<BFloat16>::load(stored));
    for (int lane = 0; lane < kLanes; ++lane) {
      narrow(wide[lane], &one);
      ASSERT_EQ(stored[lane].bits, one.bits) << wide[lane];
      ASSERT_EQ(again[lane], widen(one));
    }
  }
}
#endif

template <class E>
struct Parts : ::testing::Test {};
TYPED_TEST_SUITE(Parts, Elements);

TYPED_TEST(Parts, LoadAndStoreTouchTheFirstElementsOnly) {
  constexpr int kLanes = Simd<ComputeOf<TypeParam>>::kLanes;
  for (int count = 0; count < kLanes; ++count) {
    // At the end of an allocation, so that a sanitizer notices what lies beyond.
    const std::vector<TypeParam> source = whole_numbers<TypeParam>(count + 1, count);
    std::vector<TypeParam> target = whole_numbers<TypeParam>(kLanes, 99), before = target;
    const auto vector = Io<TypeParam>::load_first(source.data() + 1, count);
    for (int lane = 0; lane < kLanes; ++lane)
      EXPECT_EQ(vector[lane], lane < count ? widen(source[lane + 1]) : ComputeOf<TypeParam>(0));
    Io<TypeParam>::store_first(target.data(), vector, count);
    for (int lane = 0; lane < kLanes; ++lane)
      EXPECT_EQ(widen(target[lane]), lane < count ? widen(source[lane + 1]) : widen(before[lane]));
  }
}

}  // namespace rnnfast::RNNFAST_ISA
