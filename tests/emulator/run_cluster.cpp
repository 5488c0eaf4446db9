// Tier cluster's kernels in the emulator, called by tests/test_cuda_cluster.py through ctypes.
#include "run_cluster.h"

#include "cuda/tiers/cluster/cluster.h"
#include "run_layer.h"

using namespace rnnfast::cuda;

const char* rnnfast_cluster_forward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() {
    return launch_cluster_forward<kArithmetic>(forward_layer<kArithmetic>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

const char* rnnfast_cluster_backward(int arithmetic, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Arithmetic kArithmetic>() {
    return launch_cluster_backward<kArithmetic>(backward_layer<kArithmetic>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_arithmetic(arithmetic, call); });
}

void rnnfast_cluster_resources(int arithmetic, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  const ClusterResources resources = with_arithmetic(arithmetic, [&]<Arithmetic kArithmetic>() {
    return is_backward ? cluster_backward_resources<kArithmetic>(shape) : cluster_forward_resources<kArithmetic>(shape);
  });
  *threads = resources.threads;
  *shared_bytes = resources.shared_bytes;
}

int rnnfast_cluster_fits(int arithmetic, const int64_t* sizes, int is_backward) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  bool fits = false;
  const cudaError_t error = with_arithmetic(arithmetic, [&]<Arithmetic kArithmetic>() {
    return is_backward ? cluster_backward_fits<kArithmetic>(shape, &fits)
                       : cluster_forward_fits<kArithmetic>(shape, &fits);
  });
  return error == cudaSuccess ? fits : -1;
}

void rnnfast_cluster_seed(uint64_t seed) { rnnfast::emulator::configure({.seed = seed}); }
