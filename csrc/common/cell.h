// The formulas of the three cells, elementwise. All backends in C++ and CUDA use them.
//
// `Math` supplies a value type V: a SIMD vector on the CPU, a float on the GPU. V has the operators + - *. `Math` also
// has these functions:
//   one()               1
//   sigmoid(V), tanh(V)
//   sigmoid_tanh(V, V)  the product of sigmoid(first) and tanh(second)
//   relu(V)             max(V, 0)
//   relu_slope(V)       0 where V <= 0, else 1
// The matrix products W h and W x are the caller's. Notation and derivations: docs/design/maths.md.
#pragma once

#include "common/cell_spec.h"

namespace rnnfast {

template <class Math>
struct CellMath {
  using V = typename Math::V;

  // h = tanh(a) or max(a, 0)
  static RNNFAST_INLINE V rnn_forward(V a, bool relu) { return relu ? Math::relu(a) : Math::tanh(a); }

  // Gradient of the pre-activation; both derivatives follow from h itself.
  static RNNFAST_INLINE V rnn_backward(V dh, V h, bool relu) {
    return relu ? dh * Math::relu_slope(h) : dh * (Math::one() - h * h);
  }

  // In: pre-activations of r and z, x-side of n, W_hn h + b_hn, previous h. Out: activated r, z, n and the new h.
  static RNNFAST_INLINE V gru_forward(V& r, V& z, V& n, V hn, V h_prev) {
    r = Math::sigmoid(r);
    z = Math::sigmoid(z);
    n = Math::tanh(n + r * hn);
    return n + z * (h_prev - n);
  }

  struct GruGrad {
    V n_x, r, z, n_h, carry;  // gate gradients, and the part of dh that reaches h_prev directly
  };

  static RNNFAST_INLINE GruGrad gru_backward(V dh, V r, V z, V n, V hn, V h_prev) {
    const V one = Math::one();
    GruGrad grad;
    grad.n_x = dh * (one - z) * (one - n * n);
    grad.r = grad.n_x * hn * (r * (one - r));
    grad.z = dh * (h_prev - n) * (z * (one - z));
    grad.n_h = grad.n_x * r;
    grad.carry = dh * z;
    return grad;
  }

  // In: pre-activations of i f g o and the previous c. Out: activated gates and the new c; returns h.
  static RNNFAST_INLINE V lstm_forward(V& i, V& f, V& g, V& o, V& c) {
    i = Math::sigmoid(i);
    f = Math::sigmoid(f);
    g = Math::tanh(g);
    o = Math::sigmoid(o);
    c = f * c + i * g;
    return o * Math::tanh(c);
  }

  // The same where no gate is kept: sigma(i) tanh(g) and sigma(o) tanh(c) are formed as products at once.
  static RNNFAST_INLINE V lstm_infer(V i, V f, V g, V o, V& c) {
    c = Math::sigmoid(f) * c + Math::sigmoid_tanh(i, g);
    return Math::sigmoid_tanh(o, c);
  }

  struct LstmGrad {
    V i, f, g, o, dc;  // gate gradients, and the gradient of the previous c
  };

  static RNNFAST_INLINE LstmGrad lstm_backward(V dh, V dc, V i, V f, V g, V o, V c, V c_prev) {
    const V one = Math::one();
    const V tanh_c = Math::tanh(c);
    dc = dc + dh * o * (one - tanh_c * tanh_c);
    LstmGrad grad;
    grad.i = dc * g * (i * (one - i));
    grad.f = dc * c_prev * (f * (one - f));
    grad.g = dc * i * (one - g * g);
    grad.o = dh * tanh_c * (o * (one - o));
    grad.dc = dc * f;
    return grad;
  }
};

}  // namespace rnnfast
