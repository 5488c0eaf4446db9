// Tier cluster's kernels in the emulator, called by tests/test_cuda_cluster.py through ctypes.
#include "run_cluster.h"

#include "cuda/tiers/cluster/cluster.h"
#include "run_layer.h"

using namespace rnnfast::cuda;

const char* rnnfast_cluster_forward(int product, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Product kProduct>() {
    return launch_cluster_forward<kProduct>(forward_layer<kProduct>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_product(product, call); });
}

const char* rnnfast_cluster_backward(int product, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Product kProduct>() {
    return launch_cluster_backward<kProduct>(backward_layer<kProduct>(shape_of(sizes, data), data), nullptr);
  };
  return reported([&] { return with_product(product, call); });
}

void rnnfast_cluster_resources(int product, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  const ClusterResources resources = with_product(product, [&]<Product kProduct>() {
    return is_backward ? cluster_backward_resources<kProduct>(shape) : cluster_forward_resources<kProduct>(shape);
  });
  *threads = resources.threads;
  *shared_bytes = resources.shared_bytes;
}

int rnnfast_cluster_fits(int product, const int64_t* sizes, int is_backward) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  bool fits = false;
  const cudaError_t error = with_product(product, [&]<Product kProduct>() {
    return is_backward ? cluster_backward_fits<kProduct>(shape, &fits) : cluster_forward_fits<kProduct>(shape, &fits);
  });
  return error == cudaSuccess ? fits : -1;
}

void rnnfast_cluster_seed(uint64_t seed) { rnnfast::emulator::configure({.seed = seed}); }
