// Tier CTA's kernels in the emulator, called by tests/test_cuda_cta.py through ctypes.
#include "run_cta.h"

#include "cuda/tiers/cta/cta.h"
#include "run_layer.h"

using namespace rnnfast::cuda;

const char* rnnfast_cta_forward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() {
    return launch_cta_forward<kArithmetic>(forward_layer<kArithmetic>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

const char* rnnfast_cta_backward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() {
    return launch_cta_backward<kArithmetic>(backward_layer<kArithmetic>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

void rnnfast_cta_resources(int arithmetic, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  const CtaResources resources = with_arithmetic(arithmetic, [&]<Arithmetic kArithmetic>() {
    return is_backward ? cta_backward_resources<kArithmetic>(shape) : cta_forward_resources<kArithmetic>(shape);
  });
  *threads = resources.threads;
  *shared_bytes = resources.shared_bytes;
}

void rnnfast_cta_seed(uint64_t seed) { rnnfast::emulator::configure({.seed = seed}); }
