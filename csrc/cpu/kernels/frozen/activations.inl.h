// Rows of x and h in the form in which a frozen product reads them.
//
// float32   as they are; bfloat16 weights in registers: the same, with a zero behind an odd number
// bfloat16  (AVX512-BF16) rounded to nearest even
// int8      8 bits a value: q = round(v / scale) + zero, 0 to 255, with a scale and a zero point of the row. 16 bits
//           (`wide`): two planes of bytes, first the high ones, then the low ones; the kernels multiply each.

// What the sums of a row are corrected with; formats without scales leave it unused.
struct RowScale {
  float scale = 1;
  int32_t zero[2] = {0, 0};  // of the high (or only) and the low bytes
};

// Rows of activations. `row_bytes` from row to row, `plane_bytes` from the high to the low bytes.
struct ActivationRows {
  const char* data;
  int64_t row_bytes;
  int64_t plane_bytes;
  const RowScale* scale;
};

// Nearest integer to each lane, for |x| < 2^22: the sum with 1.5 * 2^23 has it in its low bits.
RNNFAST_INLINE Simd<float>::B nearest(Simd<float>::V x) {
  using S = Simd<float>;
  constexpr float kRound = 0x1.8p23f;
  return (S::B)(x + S::set(kRound)) - (S::B)S::set(kRound);
}

// The low byte of each lane.
RNNFAST_INLINE void store_bytes(char* to, Simd<float>::B lanes) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)lanes));
#else
  for (int lane = 0; lane < Simd<float>::kLanes; ++lane) to[lane] = char(lanes[lane]);
#endif
}

struct Interval {
  float low, high;  // low <= 0 <= high
};

inline Interval interval_of(const float* row, int64_t size) {
  using S = Simd<float>;
  S::V low = S::zero(), high = S::zero();
  int64_t k = 0;
  for (; k + S::kLanes <= size; k += S::kLanes) {
    const S::V x = S::load(row + k);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  Interval found{0, 0};
  for (int lane = 0; lane < S::kLanes; ++lane) {
    found.low = std::min(found.low, low[lane]);
    found.high = std::max(found.high, high[lane]);
  }
  for (; k < size; ++k) {
    found.low = row[k] < found.low ? row[k] : found.low;
    found.high = row[k] > found.high ? row[k] : found.high;
  }
  return found;
}

// One row of `size` values to bytes; `to` has room for whole vectors. kSymmetric: the zero point is the middle.
// An infinity or NaN in the row makes its scale NaN, and with it every sum.
template <bool kWide, bool kSymmetric>
RowScale quantise_row(const float* row, int64_t size, char* to, int64_t plane_bytes) {
  using S = Simd<float>;
  constexpr int kLevels = kWide ? 65535 : 255, kMiddle = kWide ? 32768 : 128;
  Interval range = interval_of(row, size);
  RowScale result;
  int32_t zero = kMiddle;
  if constexpr (kSymmetric) {
    range.high = std::max(range.high, -range.low);
    result.scale = range.high > 0 ? range.high / (kMiddle - 1) : 1;
  } else {
    // Each end by itself: their difference may be more than a float can hold.
    result.scale = range.high > range.low ? range.high / kLevels - range.low / kLevels : 1;
    const float place = -range.low / result.scale + 0.5f;  // NaN where the row has an infinity
    zero = place >= 0 ? int32_t(std::min(place, float(kLevels))) : 0;
  }
  // A scale that is no normal number has no finite inverse: all values are as good as zero.
  const float inverse = result.scale >= 0x1p-126f ? 1 / result.scale : 0;
  S::V poison = S::zero();
  const auto quantised = [&](S::V x) {
    poison += x - x;  // 0, or NaN
    const S::V scaled = x * S::set(inverse), number = scaled == scaled ? scaled : S::zero();
    return nearest(S::clamp(number, -0x1p20f, 0x1p20f)) + zero;
  };
  const auto store = [&](int64_t k, S::B q) {
    q = q < 0 ? S::B{} : q;
    q = q > kLevels ? S::B{} + kLevels : q;
    store_bytes(to + k, kWide ? q >> 8 : q);
    if constexpr (kWide) store_bytes(to + plane_bytes + k, q);
  };
  int64_t k = 0;
  for (; k + S::kLanes <= size; k += S::kLanes) store(k, quantised(S::load(row + k)));
  if (k < size) store(k, quantised(S::load_first(row + k, int(size - k))));
  float sum = 0;
  for (int lane = 0; lane < S::kLanes; ++lane) sum += poison[lane];
  result.scale += sum;
  result.zero[0] = kWide ? zero >> 8 : zero;
  result.zero[1] = zero & 255;
  return result;
}

// Bytes that a row of `depth` values takes, whole vectors of 64 bytes.
template <class F>
int64_t activation_bytes(int64_t depth, bool wide) {
  const int64_t plane = ceil_div(depth * F::kBytes, 64) * 64;
  return wide ? 2 * plane : plane;
}

// One row in the format's form. `to`: activation_bytes of room, zero behind the row's end.
template <class F, bool kSymmetric>
RowScale prepare_row(const float* row, int64_t size, char* to, [[maybe_unused]] int64_t plane_bytes,
                     [[maybe_unused]] bool wide) {
  if constexpr (F::kFormat == WeightFormat::kInt8) {
    return wide ? quantise_row<true, kSymmetric>(row, size, to, plane_bytes)
                : quantise_row<false, kSymmetric>(row, size, to, plane_bytes);
  } else if constexpr (F::kBytes == 2) {
#if defined(__AVX512BF16__)
    using S = Simd<float>;
    int64_t k = 0;
    for (; k + S::kLanes <= size; k += S::kLanes)
      Io<BFloat16>::store(reinterpret_cast<BFloat16*>(to) + k, S::load(row + k));
    if (k < size) Io<BFloat16>::store(reinterpret_cast<BFloat16*>(to) + k, S::load_first(row + k, int(size - k)));
#endif
    return {};
  } else {
    std::memcpy(to, row, size_t(size) * sizeof(float));
    return {};
  }
}
