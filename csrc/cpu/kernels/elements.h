// The element types of tensors: float, double and, with AVX-512-BF16, bfloat16.
//
// E is the type in memory and ComputeOf<E> the type of sums and activations: float for bfloat16, otherwise E.
// bfloat16 is multiplied in pairs of neighbouring k, as dpbf16ps takes them.

// Elements of k that one multiply instruction consumes.
template <class T>
constexpr int kPair = 1;
template <>
inline constexpr int kPair<BFloat16> = 2;

template <class E>
using ComputeOf = std::conditional_t<std::is_same_v<E, BFloat16>, float, E>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count` elements of k, rounded up to whole pairs.
template <class E>
int64_t whole_pairs(int64_t count) {
  return ceil_div(count, kPair<E>) * kPair<E>;
}

// One element, from the type in memory to the type of sums and back.
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
// To nearest even. A NaN stays a NaN.
inline void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Loads and stores vectors of elements: E in memory, ComputeOf<E> in registers.
template <class E>
struct Io {
  using S = Simd<E>;
  using V = typename S::V;
  static RNNFAST_INLINE V load(const E* p) { return S::load(p); }
  static RNNFAST_INLINE V load_first(const E* p, int count) { return S::load_first(p, count); }
  static RNNFAST_INLINE void store(E* p, V v) { S::store(p, v); }
  static RNNFAST_INLINE void store_first(E* p, V v, int count) { S::store_first(p, v, count); }
};

// The first `count` elements. kFull says at compile time that they are a whole vector.
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

// Pairs to[i] = {even[i], odd[i]} for i < count, and zeros in the rest of the vector. odd null: zeros.
#if defined(__AVX512BF16__)
RNNFAST_INLINE void interleave(BFloat16* to, const BFloat16* even, const BFloat16* odd, int count) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd ? mask : 0, odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif
