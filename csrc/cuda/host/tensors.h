// Tensors and matrix products, by the fastest functions of the stable ABI. They run on the device of the operators: a
// GPU, or in the emulator's library the CPU. Memory comes from torch's caching allocator, on the current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(RNNFAST_EMULATOR)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define RNNFAST_ATEN(name) aoti_torch_cpu_##name
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define RNNFAST_ATEN(name) aoti_torch_cuda_##name
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace rnnfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device of a tensor, as torch numbers it.
struct TensorDevice {
  int32_t type, index;
};

// An uninitialized contiguous tensor. torch::stable::new_empty takes three times as long: it finds its operator by
// name.
inline Tensor empty(TensorDevice device, ScalarType type, std::initializer_list<int64_t> sizes) {
  int64_t strides[4], stride = 1;  // no tensor here has more than 4 dimensions
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device.type,
                                                  device.index, &handle));
  return Tensor(handle);
}

// Another view of `tensor`'s memory. `offset` counts elements from the tensor's first.
inline Tensor view(const Tensor& tensor, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                   int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), int64_t(sizes.size()), sizes.begin(),
                                                        strides.begin(), offset, &handle));
  return Tensor(handle);
}

inline void copy(const Tensor& to, const Tensor& from) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}
inline void zero(const Tensor& tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get())); }

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(RNNFAST_ATEN(mm_out)(out.get(), a.get(), b.get()));
}
// out = addend + a b. The addend is one row, added to every row, or `out` itself.
inline void multiply_add(const Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(RNNFAST_ATEN(addmm_out)(out.get(), addend.get(), a.get(), b.get(), 1.0, 1.0));
}

template <class T = void>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T = void>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}
template <class T = void>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T = void>
T* write(const std::optional<Tensor>& tensor) {
  return tensor ? write<T>(*tensor) : nullptr;
}

}  // namespace rnnfast::cuda
