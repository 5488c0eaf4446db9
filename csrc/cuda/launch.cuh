// Host: launching a kernel, and asking how many of its blocks fit the device. Included by primitives.cuh; the emulator
// has its own launch() and resident_blocks() of the same form.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace rnnfast::cuda {

namespace detail {

inline cudaLaunchConfig_t launch_config(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return config;
}

inline void cluster_attribute(cudaLaunchAttribute& attribute, unsigned cluster) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
}

// What is allowed only to kernels that ask: over 48 KiB of dynamic shared memory, clusters of over 8 blocks.
template <class Kernel>
cudaError_t opt_in(Kernel kernel, unsigned cluster, size_t shared_bytes) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess && cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

}  // namespace detail

// Runs kernel(args...), arguments by value. `cluster`: blocks per cluster along x, 1 for none. `cooperative`: all
// blocks run at once, or the launch is refused.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, bool cooperative,
                   size_t shared_bytes, cudaStream_t stream, std::type_identity_t<Parameters>... args) {
  const cudaError_t error = detail::opt_in(kernel, cluster, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = detail::launch_config(grid, block, shared_bytes, stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (cluster > 1) detail::cluster_attribute(attributes[config.numAttrs++], cluster);
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// How many blocks of this launch the current device can hold at once (whole clusters only), in *blocks.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), dim3 block, unsigned cluster, size_t shared_bytes,
                            unsigned* blocks) {
  cudaError_t error = detail::opt_in(kernel, cluster, shared_bytes);
  int count = 0;
  if (cluster > 1) {
    cudaLaunchConfig_t config = detail::launch_config(dim3(cluster), block, shared_bytes, nullptr);
    cudaLaunchAttribute attribute;
    detail::cluster_attribute(attribute, cluster);
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    *blocks = static_cast<unsigned>(count) * cluster;
    return error;
  }
  int device = 0, processors = 0;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes);
  }
  *blocks = static_cast<unsigned>(count) * static_cast<unsigned>(processors);
  return error;
}

}  // namespace rnnfast::cuda
