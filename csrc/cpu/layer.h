// What one operator call hands to the kernels: raw pointers and sizes, no tensors. All instruction sets share it.
//
// Rows  A row is one (time, sequence) pair. Rows lie packed in time order, as in PyTorch's PackedSequence. Time t has
//       rows offset[t] .. offset[t] + count[t], and row j of a time belongs to sequence j. In padded input, count[t] =
//       batch. Sequences are sorted by falling length, so count[] never grows with t.
#pragma once

#include <cstdint>

#include "common/cell.h"

namespace rnnfast {

struct Schedule {
  int64_t steps;          // T
  int64_t batch;          // rows at t = 0, where count is largest
  int64_t total;          // rows in all
  const int64_t* count;   // [T]
  const int64_t* offset;  // [T]
  bool padded() const { return total == steps * batch; }
};

// The time of step 0, 1, ... of a direction. Direction 1 walks backwards in time.
inline int64_t time_of(const Schedule& schedule, int direction, int64_t step) {
  return direction == 0 ? step : schedule.steps - 1 - step;
}

// A matrix or vector of the user, with any strides.
struct Weight {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

struct LayerShape {
  Cell cell;
  bool relu;                                   // RNN: max(a, 0) instead of tanh(a)
  int64_t input_size, hidden_size, proj_size;  // proj_size 0: no projection
  int64_t directions;
  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }  // per direction
  int64_t gate_rows() const { return gate_count(cell) * hidden_size; }
};

struct DirectionWeights {
  Weight ih, hh, bias_ih, bias_hh, hr;  // data of the biases null: no biases
};

// Storage is the element type of the tensors. Compute is float for bfloat16, otherwise Storage. Rows are contiguous.
template <class Storage, class Compute>
struct ForwardDirection {
  DirectionWeights weights;
  const Storage* hx;  // [B, output_size]
  const Storage* cx;  // [B, H], LSTM
  Storage* h_n;       // [B, output_size], or null: the output has it
  Storage* c_n;       // [B, H], LSTM
  Storage* gates;     // [rows, saved_planes * H] activated gates, or null: nothing is saved
  Compute* cells;     // [rows, H] c, LSTM, or null
};

template <class Storage, class Compute>
struct ForwardCall {
  LayerShape shape;
  const Schedule* schedule;
  int threads;
  const Storage* input;   // [rows, I]
  int64_t input_stride;   // elements from row to row; for bfloat16 even, and rows zero-padded
  Storage* output;        // [rows, directions * output_size]
  int64_t output_stride;  // of an inner layer: input_stride of the next one; the caller has written the zeros
  ForwardDirection<Storage, Compute> direction[2];
};

template <class Storage, class Compute>
struct BackwardDirection {
  DirectionWeights weights;
  const Storage* grad_h_n;  // [B, output_size], or null: zero
  const Storage* grad_c_n;  // [B, H], or null: zero
  const Storage* hx;
  const Storage* cx;
  const Storage* gates;
  const Compute* cells;
  Storage* grad_hx;  // null: not wanted; the same for all below
  Storage* grad_cx;
  Storage* grad_weight_ih;
  Storage* grad_weight_hh;
  Storage* grad_bias_ih;
  Storage* grad_bias_hh;
  Storage* grad_weight_hr;
};

template <class Storage, class Compute>
struct BackwardCall {
  LayerShape shape;
  const Schedule* schedule;
  int threads;
  const Storage* input;        // [rows, I]
  const Storage* output;       // [rows, directions * output_size]
  const Storage* grad_output;  // like output, or null: zero
  Storage* grad_input;         // [rows, I], or null: not wanted
  BackwardDirection<Storage, Compute> direction[2];
};

struct BFloat16 {
  uint16_t bits;
};

// The entry points of one instruction set. Those of bfloat16 are null if the set multiplies no bfloat16. Forward takes
// a stack of layers: the output of each layer is the input of the next one.
struct Kernels {
  const char* name;
  void (*forward_f32)(const ForwardCall<float, float>* layers, int64_t count);
  void (*forward_f64)(const ForwardCall<double, double>* layers, int64_t count);
  void (*forward_bf16)(const ForwardCall<BFloat16, float>* layers, int64_t count);
  void (*backward_f32)(const BackwardCall<float, float>&);
  void (*backward_f64)(const BackwardCall<double, double>&);
  void (*backward_bf16)(const BackwardCall<BFloat16, float>&);
};

// The kernels for this machine, or those that RNNFAST_CPU_ISA names: std::runtime_error if the machine lacks them.
const Kernels& kernels();

// PyTorch's number of threads. 1 in a forked child.
int usable_threads();

}  // namespace rnnfast
