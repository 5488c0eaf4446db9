// The parts of the kernels for one instruction set, and what their tests and benchmarks share.
//
// RNNFAST_ISA_SOURCE names the isa_*.cpp of the set. tools/kernel_check.py gives it, with the flags of that file.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#define RNNFAST_PARTS_ONLY
#include RNNFAST_ISA_SOURCE

namespace rnnfast::RNNFAST_ISA {

inline void narrow(double x, float* to) { *to = float(x); }
inline void narrow(double x, BFloat16* to) { narrow(float(x), to); }

// Whole numbers from -4 to 4. Sums of up to a million products are exact, in any order.
template <class E>
std::vector<E> whole_numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> values(-4, 4);
  std::vector<E> numbers(count);
  for (E& number : numbers) narrow(double(values(random)), &number);
  return numbers;
}

template <class E>
std::vector<E> normal_numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> values;
  std::vector<E> numbers(count);
  for (E& number : numbers) narrow(values(random), &number);
  return numbers;
}

// A row-major weight without gaps.
template <class E>
Weight weight_of(const std::vector<E>& data, int64_t columns) {
  return {data.data(), columns, 1};
}

// Memory whose start is aligned as the kernels' scratch memory is.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : memory_(count + kAlign / sizeof(T) + 1) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (kAlign - address % kAlign) % kAlign / sizeof(T);
  }
  T* data() { return start_; }
  T& operator[](int64_t i) { return start_[i]; }

 private:
  static constexpr size_t kAlign = 128;
  std::vector<T> memory_;
  T* start_;
};

}  // namespace rnnfast::RNNFAST_ISA
