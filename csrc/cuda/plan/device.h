// What the host asks of the CUDA runtime: a device's limits, the current device and stream, errors. The emulator has
// one device and no streams.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "cuda/plan/plan.h"

#if defined(RNNFAST_EMULATOR)
#include "emulator/device.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace rnnfast::cuda {

inline void check_cuda(cudaError_t error, std::string_view what) {
  STD_TORCH_CHECK(error == cudaSuccess, "rnnfast: ", what, ": ", cudaGetErrorString(error));
}

#if defined(RNNFAST_EMULATOR)

// The emulated device is a Hopper GPU with so few multiprocessors that small problems fill it. An option of the
// emulator says how many CTAs run at once.
inline DeviceLimits limits_of(int32_t) { return {90, 8, 227 * 1024, 16, true}; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }

#else

inline DeviceLimits query_limits(int32_t device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "asking for the device's limits");
    return value;
  };
  DeviceLimits limits{};
  limits.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Clusters of 8 CTAs are portable. Data-centre devices (9.0, 10.x) also take 16.
  const bool data_centre = limits.capability / 10 == 9 || limits.capability / 10 == 10;
  limits.largest_cluster = !attribute(cudaDevAttrClusterLaunch) ? 1 : data_centre ? 16 : 8;
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch);
  return limits;
}

// Asks once per device: the attributes would take microseconds of every call.
inline const DeviceLimits& limits_of(int32_t device) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<DeviceLimits> > known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (size_t(device) >= known.size()) known.resize(size_t(device) + 1);
  if (!known[size_t(device)]) known[size_t(device)] = std::make_unique<DeviceLimits>(query_limits(device));
  return *known[size_t(device)];
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

#endif

}  // namespace rnnfast::cuda
