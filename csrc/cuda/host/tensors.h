// Tensors and matrix products by the shortest way of the stable ABI, on the device of the operators: CUDA, or the CPU
// where the emulator stands in for it. Everything allocates from torch's caching allocator on the current stream.
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

namespace rnnfast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Place {
  int32_t device_type, device_index;
};

// Uninitialized and contiguous. torch::stable::new_empty looks its operator up by name, which takes three times as
// long.
inline Tensor empty(Place place, ScalarType type, std::initializer_list<int64_t> sizes) {
  int64_t strides[4], stride = 1;  // nothing here has more dimensions
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype,
                                                  place.device_type, place.device_index, &handle));
  return Tensor(handle);
}

// A window on `tensor`'s memory; `offset` counts elements from its first.
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
// out = addend + a b; the addend is a row, or `out` itself
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
