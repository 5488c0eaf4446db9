// Tier CTA's kernels in the emulator, called by tests/test_cuda_cta.py through ctypes.
#include "run_cta.h"

#include <string>

#include "cuda/tier_cta.h"

namespace rnnfast::cuda {
namespace {

thread_local std::string message;

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

Shape shape_of(const int64_t* sizes, void* const* data) {
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

// Fills the pointers of a layer in order of their declaration; data starts behind offsets and lengths.
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

template <Product product>
cudaError_t forward(const Shape& shape, void* const* data) {
  ForwardLayer<ElementOf<product>> layer{shape};
  Pointers<ElementOf<product>> take{data + 2};
  take.weights(layer.weights);
  take(layer.hx), take(layer.cx), take(layer.gates_x), take(layer.output), take(layer.h_n), take(layer.c_n);
  take(layer.gates), take(layer.c);
  return launch_cta_forward<product>(layer, nullptr);
}

template <Product product>
cudaError_t backward(const Shape& shape, void* const* data) {
  BackwardLayer<ElementOf<product>> layer{shape};
  Pointers<ElementOf<product>> take{data + 2};
  take.weights(layer.weights);
  take(layer.hx), take(layer.cx), take(layer.output), take(layer.gates), take(layer.c), take(layer.grad_output);
  take(layer.grad_h_n), take(layer.grad_c_n), take(layer.grad_gates), take(layer.grad_projected);
  take(layer.grad_hx), take(layer.grad_cx);
  return launch_cta_backward<product>(layer, nullptr);
}

}  // namespace
}  // namespace rnnfast::cuda

using namespace rnnfast::cuda;

namespace {

// Calls use.template operator()<product>() for the product of this number.
template <class Use>
auto with_product(int product, Use use) {
  switch (Product(product)) {
    case Product::kBfloat16:
      return use.template operator()<Product::kBfloat16>();
    case Product::kHalf:
      return use.template operator()<Product::kHalf>();
    case Product::kTf32:
      return use.template operator()<Product::kTf32>();
    default:
      return use.template operator()<Product::kExact>();
  }
}

}  // namespace

const char* rnnfast_cta_forward(int product, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Product kProduct>() { return forward<kProduct>(shape_of(sizes, data), data); };
  return reported([&] { return with_product(product, call); });
}

const char* rnnfast_cta_backward(int product, const int64_t* sizes, void* const* data) {
  const auto call = [&]<Product kProduct>() { return backward<kProduct>(shape_of(sizes, data), data); };
  return reported([&] { return with_product(product, call); });
}

void rnnfast_cta_resources(int product, const int64_t* sizes, int is_backward, int* threads, int* shared_bytes) {
  void* const no_rows[2] = {};
  const Shape shape = shape_of(sizes, no_rows);
  const CtaResources resources = with_product(product, [&]<Product kProduct>() {
    return is_backward ? cta_backward_resources<kProduct>(shape) : cta_forward_resources<kProduct>(shape);
  });
  *threads = resources.threads;
  *shared_bytes = resources.shared_bytes;
}

void rnnfast_cta_seed(uint64_t seed) { rnnfast::emulator::configure({.seed = seed}); }
