// What the C entry points of every tier share (run_*.cpp): layers from plain arrays, errors as messages.
#pragma once
#include <exception>
#include <string>

#include "cuda/device/arithmetic.cuh"

namespace rnnfast::cuda {

inline thread_local std::string message;

// Calls work() and turns what it throws or returns into a message; null: no error.
template <class Work>
const char* reported(Work work) {
  try {
    const cudaError_t error = work();
    if (error == cudaSuccess) return nullptr;
    message = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

inline Shape shape_of(const int64_t* sizes, void* const* data) {
  return {.cell = Cell(sizes[0]),
          .relu = sizes[1] != 0,
          .hidden_size = int(sizes[2]),
          .output_size = int(sizes[3]),
          .steps = int(sizes[4]),
          .batch = int(sizes[5]),
          .directions = int(sizes[6]),
          .rows = sizes[7],
          .offsets = static_cast<const int64_t*>(data[0]),
          .lengths = static_cast<const int32_t*>(data[1])};
}

// Fills the pointers of a layer in order of their declaration. data starts after offsets and lengths.
template <class Element>
struct Pointers {
  void* const* next;
  template <class T>
  void operator()(T*& pointer) {
    pointer = static_cast<T*>(*next++);
  }
  void weights(Weights<Element> (&all)[kMaxDirections]) {
    for (Weights<Element>& each : all) {
      (*this)(each.weight_hh);
      (*this)(each.weight_hr);
      (*this)(each.bias_hn);
    }
  }
};

template <Arithmetic arithmetic>
ForwardLayer<ElementOf<arithmetic>> forward_layer(const Shape& shape, void* const* data) {
  ForwardLayer<ElementOf<arithmetic>> layer{shape};
  Pointers<ElementOf<arithmetic>> take{data + 2};
  take.weights(layer.weights);
  take(layer.hx), take(layer.cx), take(layer.gates_x), take(layer.output), take(layer.h_n), take(layer.c_n);
  take(layer.gates), take(layer.c);
  return layer;
}

template <Arithmetic arithmetic>
BackwardLayer<ElementOf<arithmetic>> backward_layer(const Shape& shape, void* const* data) {
  BackwardLayer<ElementOf<arithmetic>> layer{shape};
  Pointers<ElementOf<arithmetic>> take{data + 2};
  take.weights(layer.weights);
  take(layer.hx), take(layer.cx), take(layer.output), take(layer.gates), take(layer.c), take(layer.grad_output);
  take(layer.grad_h_n), take(layer.grad_c_n), take(layer.grad_gates), take(layer.grad_projected);
  take(layer.grad_hx), take(layer.grad_cx);
  return layer;
}

// Calls use.template operator()<arithmetic>() for the Arithmetic of this number.
template <class Use>
auto with_arithmetic(int arithmetic, Use use) {
  switch (Arithmetic(arithmetic)) {
    case Arithmetic::kBfloat16:
      return use.template operator()<Arithmetic::kBfloat16>();
    case Arithmetic::kHalf:
      return use.template operator()<Arithmetic::kHalf>();
    case Arithmetic::kTf32:
      return use.template operator()<Arithmetic::kTf32>();
    default:
      return use.template operator()<Arithmetic::kExact>();
  }
}

}  // namespace rnnfast::cuda
