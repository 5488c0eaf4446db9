// What every kernel of csrc/cuda takes: one layer with all its directions, as plain pointers to device memory.
//
// Kernels compute only the recurrence. A matrix product before it makes gates_x = x W_ih^T + biases. Products after it
// make the gradients of weights, biases and x. Every tensor is contiguous, and aligned to its element only.
//
// Rows: a (time, sequence) pair is a row. Time t's rows start at offsets[t], without offsets at t * B. Sequence b is at
// that row plus b, and takes part while t < lengths[b]. Direction 1 starts at a sequence's last step. So both
// directions walk over t for all sequences alike. Where t >= lengths[b], a sequence's state does not change: it is hx
// and cx before the first step, h_n and c_n after the last. There are three forms:
//   dense    offsets and lengths null
//   padded   lengths only: rows with t >= lengths[b] exist in memory. Kernels never read them, and write zeros there to
//            every result that has rows
//   packed   both: those rows do not exist
#pragma once

#include <cstdint>

#include "common/cell.h"

namespace rnnfast::cuda {

constexpr int kMaxDirections = 2;

struct Shape {
  Cell cell;
  bool relu;               // RNN: max(a, 0) in place of tanh(a)
  int hidden_size;         // H
  int output_size;         // P: proj_size where projected, else H
  int steps;               // T
  int batch;               // B
  int directions;          // D
  int64_t rows;            // N: T * B, or sum(batch_sizes)
  const int64_t* offsets;  // [T]: first row of each step; null: t * B
  const int32_t* lengths;  // [B]: steps of each sequence, 0 allowed; null: all T
};

// One direction's weights; G = gate_count(cell).
template <class Element>
struct Weights {
  const Element* weight_hh;  // [G*H, P]
  const Element* weight_hr;  // [P, H]; null: no projection
  const Element* bias_hn;    // [H], GRU only: b_hn, the bias that r multiplies; null: zeros
};

// Element is the tensors' type: __nv_bfloat16, __half or float. "null:" says what a null pointer means.
template <class Element>
struct ForwardLayer : Shape {
  Weights<Element> weights[kMaxDirections];
  const Element* hx;       // [D, B, P]; null: zeros
  const Element* cx;       // [D, B, H], LSTM only; null: zeros
  const Element* gates_x;  // [D, N, G*H]: x W_ih^T + b_ih + b_hh; GRU's n plane without b_hn
  Element* output;         // [N, D*P]
  Element* h_n;            // [D, B, P]
  Element* c_n;            // [D, B, H], LSTM only
  Element* gates;          // [D, N, 4*H] activated: LSTM i f g o (may be gates_x itself), GRU r z n (W_hn h + b_hn);
                           // null: inference, or RNN
  float* c;                // [D, N, H], LSTM only; null: inference
};

template <class Element>
struct BackwardLayer : Shape {
  Weights<Element> weights[kMaxDirections];
  const Element* hx;           // [D, B, P]; null: zeros
  const Element* cx;           // [D, B, H], LSTM only; null: zeros
  const Element* output;       // [N, D*P], of forward
  const Element* gates;        // [D, N, 4*H], of forward
  const float* c;              // [D, N, H], of forward
  const Element* grad_output;  // [N, D*P]; null: zeros
  const Element* grad_h_n;     // [D, B, P]; null: zeros
  const Element* grad_c_n;     // [D, B, H], LSTM only; null: zeros
  Element* grad_gates;  // [D, N, 4*H], GRU: n_x r z n_h (the first three multiply x, the last three h); RNN [D, N, H]
  Element* grad_projected;  // [D, N, P]: gradient of the projected h; only where projected
  Element* grad_hx;         // [D, B, P]
  Element* grad_cx;         // [D, B, H], LSTM only
};

// How a kernel multiplies; the element type follows from it.
enum class Arithmetic {
  kBfloat16,  // __nv_bfloat16
  kHalf,      // __half
  kTf32,      // float, operands rounded to 10 bits of mantissa
  kExact,     // float, as accurate as float32 sums
};

constexpr bool is_16_bit(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::kBfloat16 || arithmetic == Arithmetic::kHalf;
}

// Projections always shrink: PyTorch wants proj_size < hidden_size.
inline bool is_projected(const Shape& shape) { return shape.output_size < shape.hidden_size; }

// The largest H of tier CTA: in each of 8 warps, up to 128 registers hold weights. A float takes a whole register.
// Exact products need room for its low part too, in a second register or in shared memory.
constexpr int cta_largest_hidden(Arithmetic arithmetic, Cell cell) {
  return (cell == Cell::kRnn ? 256 : 128) / (is_16_bit(arithmetic) ? 1 : 2);
}

}  // namespace rnnfast::cuda
