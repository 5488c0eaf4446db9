// Checks of one tensor. check_layer.h uses them for all arguments of an operator. Every check comes before anything is
// computed. Every message names what was expected and what was given.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <initializer_list>
#include <string>

// Refuses the arguments of an operator unless the condition holds. rnnfast/ops.py recognises a refusal by its first
// words. Only a refusal sends a call to torch's own operator.
#define RNNFAST_REQUIRE(condition, ...) STD_TORCH_CHECK(condition, "rnnfast refuses: ", __VA_ARGS__)

namespace rnnfast {

using torch::stable::Tensor;

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// The name of a tensor in a message. A weight's name has its index in the list. The text is made only when a check
// fails.
struct Name {
  const char* text;
  int64_t index = -1;
  std::string str() const {
    return index < 0 ? std::string(text) : std::string(text).append("[").append(std::to_string(index)).append("]");
  }
};

// What the checks read of a tensor. Each of these values costs a call into libtorch, so they are fetched once.
struct Facts {
  int64_t dim;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type, device_index;

  explicit Facts(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    int64_t* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &data));
    sizes = data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &data));
    strides = data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }

  bool has_shape(std::initializer_list<int64_t> expected) const {
    return dim == int64_t(expected.size()) && std::equal(expected.begin(), expected.end(), sizes);
  }
};

// Checks that the memory holds the whole shape. A user can free or shorten it and keep the shape (storage.resize_).
inline void check_memory(const Tensor& tensor, const Facts& facts, Name name) {
  int64_t offset, bytes, last = 0;
  for (int64_t i = 0; i < facts.dim; ++i) {
    if (facts.sizes[i] == 0) return;
    last += (facts.sizes[i] - 1) * facts.strides[i];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t expected = (offset + last + 1) * int64_t(tensor.element_size());
  RNNFAST_REQUIRE(bytes >= expected, name.str(), ": expected ", expected, " bytes of memory, got ", bytes);
}

inline void check_shape(const Tensor& tensor, const Facts& facts, std::initializer_list<int64_t> expected, Name name) {
  if (facts.has_shape(expected)) return check_memory(tensor, facts, name);
  std::string text;
  for (const int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  RNNFAST_REQUIRE(false, name.str(), ": expected shape [", text, "], got ", shape_text(tensor));
}
inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> expected, Name name) {
  check_shape(tensor, Facts(tensor), expected, name);
}

// Checks shape, memory, dtype and device. `like` are the facts of `input`.
inline void check_like(const Tensor& tensor, std::initializer_list<int64_t> expected, const Tensor& input,
                       const Facts& like, Name name) {
  const Facts facts(tensor);
  RNNFAST_REQUIRE(facts.device_type == like.device_type && facts.device_index == like.device_index, name.str(),
                  ": expected the device of input");
  RNNFAST_REQUIRE(facts.dtype == like.dtype, name.str(), ": expected the dtype of input (",
                  toString(input.scalar_type()), "), got ", toString(tensor.scalar_type()));
  check_shape(tensor, facts, expected, name);
}

}  // namespace rnnfast
