// Host: launches a kernel, and asks how many of its blocks fit the device. primitives.cuh includes this file. The
// emulator has its own launch() and resident_blocks() of the same form.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

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

// What the driver knows of a kernel on a device. It is told and asked once, because that takes long and a call has few
// microseconds. A kernel always has the same block, cluster and shared memory.
struct Known {
  bool opted_in = false;
  bool counted = false;
  unsigned resident_blocks = 0;
};

inline std::mutex known_mutex;  // held while what known_of() returned is used

inline Known& known_of(const void* kernel, int device) {
  static std::map<std::pair<const void*, int>, Known> all;
  return all[{kernel, device}];
}

// Kernels must ask for over 48 KiB of dynamic shared memory, and for clusters of over 8 blocks.
inline bool needs_opt_in(unsigned cluster, size_t shared_bytes) { return shared_bytes > 48 << 10 || cluster > 8; }

template <class Kernel>
cudaError_t opt_in(Kernel kernel, unsigned cluster, size_t shared_bytes, Known& known) {
  cudaError_t error = cudaSuccess;
  if (known.opted_in) return error;
  if (shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess && cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  known.opted_in = error == cudaSuccess;
  return error;
}

template <class Kernel>
cudaError_t count_resident_blocks(Kernel kernel, dim3 block, unsigned cluster, size_t shared_bytes, int device,
                                  int* blocks) {
  if (cluster > 1) {
    cudaLaunchConfig_t config = launch_config(dim3(cluster), block, shared_bytes, nullptr);
    cudaLaunchAttribute attribute;
    cluster_attribute(attribute, cluster);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(blocks, kernel, &config);
    *blocks *= static_cast<int>(cluster);
    return error;
  }
  int processors = 0;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared_bytes);
  }
  *blocks *= processors;
  return error;
}

}  // namespace detail

// Runs kernel(args...), arguments by value. cluster: blocks per cluster along x, 1 for none. cooperative: all blocks
// run at once, or the launch is refused.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, bool cooperative,
                   size_t shared_bytes, cudaStream_t stream, std::type_identity_t<Parameters>... args) {
  if (detail::needs_opt_in(cluster, shared_bytes)) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(detail::known_mutex);
    if (error == cudaSuccess) {
      const void* const key = reinterpret_cast<const void*>(kernel);
      error = detail::opt_in(kernel, cluster, shared_bytes, detail::known_of(key, device));
    }
    if (error != cudaSuccess) return error;
  }
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

// How many blocks of this launch the current device can hold at once (whole clusters only), in *blocks. An error is
// returned and removed from CUDA's last error.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), dim3 block, unsigned cluster, size_t shared_bytes,
                            unsigned* blocks) {
  int device = 0, count = 0;
  *blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(detail::known_mutex);
  detail::Known& known = detail::known_of(reinterpret_cast<const void*>(kernel), device);
  if (!known.counted) {
    error = detail::opt_in(kernel, cluster, shared_bytes, known);
    if (error == cudaSuccess) {
      error = detail::count_resident_blocks(kernel, block, cluster, shared_bytes, device, &count);
    }
    if (error != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return error;
    }
    known.resident_blocks = static_cast<unsigned>(count);
    known.counted = true;
  }
  *blocks = known.resident_blocks;
  return cudaSuccess;
}

}  // namespace rnnfast::cuda
