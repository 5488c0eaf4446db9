// The three formats of frozen weights: how 4 bytes of an activation multiply a vector of weights.
//
// A Format has
//   Sum            a vector of sums; float or int32
//   Weights        what one vector of 4-byte weights becomes in registers
//   Activation     4 bytes of an activation, in every lane
//   multiply_add   sum += activation * weights
// kBytes: of an activation, for each k of a step. All formats read 4 bytes of weights a lane and step (cpu/frozen.h).
//
// int8: a weight has 8 signed bits, an activation 8 unsigned ones. Sums are exact in every instruction set: no
// instruction that saturates is used, and 65,535 products of 255 * 127 fit 31 bits.

struct FrozenFloat32 {
  using S = Simd<float>;
  using Sum = S::V;
  using Weights = S::V;
  using Activation = S::V;
  static constexpr WeightFormat kFormat = WeightFormat::kFloat32;
  static constexpr int kBytes = 4;
  static RNNFAST_INLINE Weights load(const char* from) { return S::load(reinterpret_cast<const float*>(from)); }
  static RNNFAST_INLINE Activation broadcast(const char* from) { return S::set(*reinterpret_cast<const float*>(from)); }
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) { sum += a * w; }
};

#if defined(__AVX512BF16__)
// ActivationRows are rounded to bfloat16, products and sums are float32.
struct FrozenBFloat16 {
  using Sum = Simd<float>::V;
  using Weights = __m512bh;
  using Activation = __m512bh;
  static constexpr WeightFormat kFormat = WeightFormat::kBFloat16;
  static constexpr int kBytes = 2;
  static RNNFAST_INLINE Weights load(const char* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static RNNFAST_INLINE Activation broadcast(const char* from) {
    int32_t pair;
    std::memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) {
    sum = (Sum)_mm512_dpbf16_ps((__m512)sum, a, w);
  }
};
#else
// Weights are widened in registers; activations stay float32.
struct FrozenBFloat16 {
  using S = Simd<float>;
  using Sum = S::V;
  struct Weights {
    S::V even, odd;
  };
  using Activation = Weights;
  static constexpr WeightFormat kFormat = WeightFormat::kBFloat16;
  static constexpr int kBytes = 4;
  static RNNFAST_INLINE Weights load(const char* from) {
    const S::B pair = (S::B)S::load(reinterpret_cast<const float*>(from));
    return {(S::V)(pair << 16), (S::V)(pair & int32_t(0xffff0000))};
  }
  static RNNFAST_INLINE Activation broadcast(const char* from) {
    const float* const pair = reinterpret_cast<const float*>(from);
    return {S::set(pair[0]), S::set(pair[1])};
  }
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) {
    sum += a.even * w.even;
    sum += a.odd * w.odd;
  }
};
#endif

// What all forms of int8 share.
struct FrozenInt8Sums {
  using Sum = Simd<float>::B;
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;
  static constexpr int kBytes = 1;
  static RNNFAST_INLINE uint32_t word(const char* from) {
    uint32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
  }
  static RNNFAST_INLINE Sum load_bits(const char* from) {
    Sum bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
  }
  static RNNFAST_INLINE Sum set(uint32_t x) { return Sum{} + int32_t(x); }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct FrozenInt8 : FrozenInt8Sums {
  using Weights = Sum;
  using Activation = Sum;
  static RNNFAST_INLINE Weights load(const char* from) { return load_bits(from); }
  static RNNFAST_INLINE Activation broadcast(const char* from) { return set(word(from)); }
  // The builtin and a vector of int: GCC 12 copies __m512i sums to memory and back around _mm512_dpbusd_epi32.
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) {
#if defined(__AVX512VNNI__)
    sum = (Sum)__builtin_ia32_vpdpbusd_v16si(sum, a, w);
#else
    sum = (Sum)__builtin_ia32_vpdpbusd_v8si(sum, a, w);
#endif
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
// vdotq_s32 multiplies signed bytes. 128 is taken off every activation, and off its zero point.
struct FrozenInt8 : FrozenInt8Sums {
  using Weights = int8x16_t;
  using Activation = int8x16_t;
  static constexpr int32_t kOffset = 128;
  static RNNFAST_INLINE Weights load(const char* from) { return vld1q_s8(reinterpret_cast<const int8_t*>(from)); }
  static RNNFAST_INLINE Activation broadcast(const char* from) {
    return vreinterpretq_s8_u32(vdupq_n_u32(word(from) ^ 0x80808080u));
  }
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) {
    sum = (Sum)vdotq_s32((int32x4_t)sum, a, w);
  }
};
#else
// Bytes are widened to 16 bits and multiplied in pairs (vpmaddwd on x86): exact, where vpmaddubsw would saturate.
struct FrozenInt8 : FrozenInt8Sums {
  struct Weights {
    Sum even, odd;  // of each 32-bit lane the bytes 0 and 2, and 1 and 3, as pairs of int16
  };
  using Activation = Weights;
  static RNNFAST_INLINE Weights load(const char* from) {
    typedef int16_t Shorts __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
    const Shorts bytes = (Shorts)load_bits(from);
    return {(Sum)((bytes << 8) >> 8), (Sum)(bytes >> 8)};
  }
  static RNNFAST_INLINE Activation broadcast(const char* from) {
    const uint32_t bytes = word(from);
    return {set(bytes & 0x00ff00ff), set(bytes >> 8 & 0x00ff00ff)};
  }
  static RNNFAST_INLINE Sum multiply_pairs(Sum a, Sum b) {
#if defined(__AVX512BW__)
    return (Sum)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Sum)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Sum)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
  }
  static RNNFAST_INLINE void multiply_add(Sum& sum, Activation a, Weights w) {
    sum += multiply_pairs(a.even, w.even);
    sum += multiply_pairs(a.odd, w.odd);
  }
};
#endif

template <class F>
constexpr int32_t kActivationOffset = 0;  // what `broadcast` takes off an int8 activation
#if defined(__ARM_FEATURE_DOTPROD)
template <>
inline constexpr int32_t kActivationOffset<FrozenInt8> = FrozenInt8::kOffset;
#endif
