// New tensors on the CPU, made by the fastest functions of the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace rnnfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An uninitialized contiguous tensor. This takes 0.5 µs of a call of 10 µs (Zen 4). torch::stable::new_empty takes
// 1.4 µs: it finds its operator by name and boxes the arguments.
inline Tensor empty(ScalarType type, const int64_t* sizes, int64_t dim) {
  int64_t strides[3], stride = 1;  // no result of an operator has more than 3 dimensions
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides,
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(ScalarType type, std::initializer_list<int64_t> sizes) {
  return empty(type, sizes.begin(), int64_t(sizes.size()));
}
inline Tensor empty_like(ScalarType type, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return empty(type, sizes.data(), int64_t(sizes.size()));
}

inline Tensor zeros(ScalarType type, std::initializer_list<int64_t> sizes) {
  Tensor tensor = empty(type, sizes);
  if (const size_t count = size_t(tensor.numel()))
    std::memset(tensor.mutable_data_ptr(), 0, count * tensor.element_size());
  return tensor;
}

}  // namespace rnnfast
