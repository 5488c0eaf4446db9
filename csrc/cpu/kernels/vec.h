// A SIMD vector of the CPU kernels, and the activations on it.
//
// GCC and Clang vector extensions let one source serve SSE2, AVX2, AVX-512 and NEON. RNNFAST_VECTOR_BYTES is 16, 32 or
// 64. Simd<T> is the `Math` of common/cell.h for T = float or double.
//
// a * b + c becomes one fma instruction where the instruction set has it (-ffp-contract=fast, the default of GNU C++).
//
// All activations use one exponential of base 2, without the special cases of a library. The absolute error in float32,
// against float64, is below 1e-7 for sigmoid and below 1.8e-7 for tanh (tests/api/test_robustness.py).
// NaN passes through, because clamp() keeps a NaN.

template <class T>
struct Simd {
  static constexpr int kLanes = RNNFAST_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Bits B __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

  static RNNFAST_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static RNNFAST_INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
  // x - 0 is x, for x = -0 too. So the compiler leaves a broadcast only.
  static RNNFAST_INLINE V set(T x) { return x - V{}; }
  static RNNFAST_INLINE V zero() { return V{}; }
  static RNNFAST_INLINE V one() { return set(T(1)); }

  // The first `count` lanes only. Memory beyond them is neither read nor written.
  static RNNFAST_INLINE V load_first(const T* p, int count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return (V)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
    else
      return (V)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#endif
    V v{};
    for (int lane = 0; lane < count; ++lane) v[lane] = p[lane];
    return v;
  }
  static RNNFAST_INLINE void store_first(T* p, V v, int count) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
    else
      return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
#endif
    for (int lane = 0; lane < count; ++lane) p[lane] = v[lane];
  }

#if defined(__AVX512F__)
  typedef T Half __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
  static RNNFAST_INLINE Half low_half(V v) {
    if constexpr (sizeof(T) == 4)
      return (Half)_mm512_castps512_ps256((__m512)v);
    else
      return (Half)_mm512_castpd512_pd256((__m512d)v);
  }
  // With zeros in the upper half.
  static RNNFAST_INLINE V from_half(Half v) {
    return (V)_mm512_maskz_insertf64x4(0xff, _mm512_setzero_pd(), (__m256d)v, 0);
  }
#endif

  static RNNFAST_INLINE V clamp(V x, T low, T high) {
    // x86's max and min take one instruction per bound, a comparison takes two. For NaN they return the second operand.
    if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
      return (V)_mm512_min_ps((__m512)set(high), _mm512_max_ps((__m512)set(low), (__m512)x));
#elif defined(__AVX2__)
      return (V)_mm256_min_ps((__m256)set(high), _mm256_max_ps((__m256)set(low), (__m256)x));
#elif defined(__SSE2__)
      return (V)_mm_min_ps((__m128)set(high), _mm_max_ps((__m128)set(low), (__m128)x));
#endif
    }
    x = x < set(low) ? set(low) : x;
    return x > set(high) ? set(high) : x;
  }
  static RNNFAST_INLINE V relu(V x) { return x < zero() ? zero() : x; }
  static RNNFAST_INLINE V relu_slope(V x) { return x <= zero() ? zero() : one(); }

  // 1 / x for finite normal x.
  static RNNFAST_INLINE V reciprocal(V x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const V guess = (V)_mm512_rcp14_ps((__m512)x);  // 14 exact bits; one Newton step doubles them
      return guess + guess * (one() - guess * x);
    }
#endif
    return one() / x;
  }

  // 2^t = s p + s, where n is the nearest integer of t, s = 2^n and p = 2^(t - n) - 1.
  static RNNFAST_INLINE void exp2_parts(V t, V& p, V& s) {
    // Adding 1.5 * 2^(mantissa bits) leaves the nearest integer in the low bits. The bias makes it the exponent of 2^n.
    constexpr T kRound = sizeof(T) == 4 ? T(0x1.8p23) + 127 : T(0x1.8p52) + 1023;
    constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52;
    const V shifted = t + set(kRound);
    const V f = t - (shifted - set(kRound));
    V q;
    if constexpr (sizeof(T) == 4) {
      // A minimax polynomial (Lawson) of (2^f - 1) / f on |f| <= 1/2. Relative error 2e-8, with rounded coefficients.
      constexpr T kCoefficients[] = {1.5403512225e-04f, 1.3390735257e-03f, 9.6182376146e-03f,
                                     5.5503573269e-02f, 2.4022649229e-01f, 6.9314718246e-01f};
      q = set(kCoefficients[0]);
      for (int term = 1; term < 6; ++term) q = q * f + set(kCoefficients[term]);
      p = q * f;
    } else {
      // The Taylor series of e^r up to r^13, r = f ln2. The first omitted term is 4e-18 of e^r.
      constexpr double kInverseFactorial[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                              1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                              1. / 120,        1. / 24,        1. / 6,        1. / 2};
      const V r = f * set(T(0.69314718055994530942));
      q = set(T(kInverseFactorial[0]));
      for (int term = 1; term < 12; ++term) q = q * r + set(T(kInverseFactorial[term]));
      p = r * r * q + r;
    }
    s = (V)((B)shifted << kMantissa);
  }

  static constexpr T kLog2e = T(1.44269504088896340736);

  // d = 1 + e^-x, so sigmoid(x) = 1 / d. Beyond the clamp sigmoid is 1, or below 1e-28.
  static RNNFAST_INLINE V sigmoid_denominator(V x) {
    constexpr T kLimit = sizeof(T) == 4 ? T(93) : T(1000);
    V p, s;
    exp2_parts(clamp(x * set(-kLog2e), -kLimit, kLimit), p, s);
    return one() + (s * p + s);
  }

  // e = e^2x - 1 to full relative precision, also for small x. tanh(x) = e / (e + 2). Beyond the clamp tanh is 1 or -1.
  static RNNFAST_INLINE V tanh_numerator(V x) {
    constexpr T kLimit = sizeof(T) == 4 ? T(30) : T(60);
    V p, s;
    exp2_parts(clamp(x * set(2 * kLog2e), -kLimit, kLimit), p, s);
    return s * p + (s - one());
  }

  static RNNFAST_INLINE V sigmoid(V x) { return reciprocal(sigmoid_denominator(x)); }

  static RNNFAST_INLINE V tanh(V x) {
    const V e = tanh_numerator(x);
    return e * reciprocal(e + set(T(2)));
  }

  // sigmoid(x) * tanh(y) with one reciprocal. The clamps keep the product of the denominators below 2^126.
  static RNNFAST_INLINE V sigmoid_tanh(V x, V y) {
    const V e = tanh_numerator(y);
    return e * reciprocal(sigmoid_denominator(x) * (e + set(T(2))));
  }
};
