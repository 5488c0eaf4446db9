"""csrc/cuda/device/launch.cuh with a CUDA runtime that only counts what it is asked, once or at every launch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

RUNTIME = """
#pragma once
#include <cstddef>
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { dim3 clusterDim; int cooperative; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline int device, attributes, queries, launches, cleared;
inline cudaError_t answer = cudaSuccess;
inline cudaError_t cudaGetDevice(int* current) { return *current = device, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return ++cleared, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) { return ++attributes, answer; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
  return ++queries, *count = 7, answer;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int, size_t) {
  return ++queries, *count = 2, answer;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Parameters...), Arguments...) {
  return ++launches, cudaSuccess;
}
"""
PROGRAM = """
#include "cuda/device/launch.cuh"
#include <cassert>
using namespace rnnfast::cuda;
void one(int) {}
void other(int, float) {}
void in_cluster(int, float*) {}
int main() {
  unsigned blocks = 0;
  for (int call = 0; call < 5; ++call) {
    assert(launch(one, dim3(4), dim3(256), 1, true, 100 << 10, nullptr, 1) == cudaSuccess);
    assert(launch(other, dim3(4), dim3(256), 1, false, 48 << 10, nullptr, 1, 1.f) == cudaSuccess);
    assert(launch(in_cluster, dim3(16), dim3(256), 16, false, 100 << 10, nullptr, 1, nullptr) == cudaSuccess);
    assert(resident_blocks(one, dim3(256), 1, 100 << 10, &blocks) == cudaSuccess && blocks == 264);
    assert(resident_blocks(in_cluster, dim3(256), 16, 100 << 10, &blocks) == cudaSuccess && blocks == 112);
  }
  assert(launches == 15 && attributes == 3 && queries == 2);
  device = 1;  // what one device was told, another does not know
  assert(launch(one, dim3(4), dim3(256), 1, true, 100 << 10, nullptr, 1) == cudaSuccess && attributes == 4);
  assert(resident_blocks(one, dim3(256), 1, 100 << 10, &blocks) == cudaSuccess && queries == 3);
  device = 2;
  answer = cudaErrorNoKernelImageForDevice;  // not remembered, and not left for the next who asks for an error
  for (int call = 1; call <= 2; ++call) {
    assert(resident_blocks(one, dim3(256), 1, 100 << 10, &blocks) == answer && blocks == 0 && cleared == call);
  }
  assert(launch(one, dim3(4), dim3(256), 1, true, 100 << 10, nullptr, 1) == answer && launches == 16);
}
"""


def test_a_kernel_is_asked_and_told_once_per_device(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", f"-I{tmp_path}", f"-I{CSRC}", "-o", tmp_path / "program"]
    subprocess.run([*command, tmp_path / "program.cpp"], check=True)
    subprocess.run([tmp_path / "program"], check=True)
