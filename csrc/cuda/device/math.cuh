// The mathematics that csrc/common/cell.h asks for, on one float per lane.
//
// ExactMath: float32 accuracy, from the hardware's 2^x and 1/x (relative errors 2^-22 and 2^-23).
// ApproximateMath: the hardware's tanh (relative error 2^-11), for results that are rounded to bfloat16 (2^-9). float16
// would lose a bit. The backward pass multiplies saved values, and no sigmoid or tanh damps their errors there.
#pragma once

#include "common/cell.h"
#include "cuda/device/primitives.cuh"

namespace rnnfast::cuda {

struct CommonMath {
  using V = float;
  static RNNFAST_INLINE V one() { return 1.0f; }
  static RNNFAST_INLINE V relu(V x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
  static RNNFAST_INLINE V relu_slope(V x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

struct ExactMath : CommonMath {
  // 1 / (1 + 2^(-x log2 e)). Absolute error 3e-7. For x far below 0 the relative error is that of 2^x, 1e-5.
  static RNNFAST_INLINE V sigmoid(V x) {
    return reciprocal_approximate(1.0f + exp2_approximate(-1.4426950408889634f * x));
  }

  // 1 - 2 / (1 + 2^(2|x| log2 e)). This cancels near 0, so up to 0.55 an odd polynomial x + x^3 p(x^2) takes its place,
  // the one of the least relative error (4e-8). Absolute error 2e-7, relative error 5e-7 everywhere.
  static RNNFAST_INLINE V tanh(V x) {
    const V magnitude = fabsf(x);
    const V square = x * x;
    V p = 0.016437436f;
    p = fmaf(p, square, -0.052671738f);
    p = fmaf(p, square, 0.13320725f);
    p = fmaf(p, square, -0.33332947f);
    const V small = fmaf(x * square, p, x);
    const V power = exp2_approximate(2.8853900817779268f * magnitude);
    const V large = copysignf(fmaf(-2.0f, reciprocal_approximate(1.0f + power), 1.0f), x);
    return magnitude < 0.55f ? small : large;
  }

  static RNNFAST_INLINE V sigmoid_tanh(V a, V b) { return sigmoid(a) * tanh(b); }
};

struct ApproximateMath : CommonMath {
  static RNNFAST_INLINE V tanh(V x) { return tanh_approximate(x); }
  static RNNFAST_INLINE V sigmoid(V x) { return fmaf(0.5f, tanh_approximate(0.5f * x), 0.5f); }
  static RNNFAST_INLINE V sigmoid_tanh(V a, V b) { return sigmoid(a) * tanh(b); }
};

// The mathematics of an element type's forward pass.
template <class Element>
using ForwardMath = std::conditional_t<std::is_same_v<Element, __nv_bfloat16>, ApproximateMath, ExactMath>;

}  // namespace rnnfast::cuda
