// What one op call hands to the kernels: raw pointers and sizes, no Tensor. Shared by every instruction set.
//
// Rows. A "row" is one (time, sequence) pair. Rows are stored packed in time order, as in PyTorch's PackedSequence:
// time t holds rows offset[t] .. offset[t] + count[t], and row j of a time step belongs to sequence j. Padded input is
// the case count[t] = batch. Sequences are sorted by falling length, so count[] never grows with t.
#pragma once

#include <cstdint>

#include "common/cell.h"

namespace rnnfast {

struct Schedule {
  int64_t steps;          // T
  int64_t batch;          // rows at t = 0, the largest count
  int64_t total;          // rows in all
  const int64_t* count;   // [T]
  const int64_t* offset;  // [T]
  bool padded() const { return total == steps * batch; }
};

// Step 0, 1, ... of a direction: forwards in time, or backwards.
inline int64_t time_of(const Schedule& schedule, int direction, int64_t step) {
  return direction == 0 ? step : schedule.steps - 1 - step;
}

// A matrix or vector as the user holds it: any strides.
struct Weight {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

struct LayerShape {
  Cell cell;
  bool relu;                                   // RNN: max(a, 0) in place of tanh(a)
  int64_t input_size, hidden_size, proj_size;  // proj_size 0: no projection
  int64_t directions;
  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }  // per direction
  int64_t gate_rows() const { return gate_count(cell) * hidden_size; }
};

struct DirectionWeights {
  Weight ih, hh, bias_ih, bias_hh, hr;  // bias data null: no biases
};

// Storage is the tensors' element type; Compute is float for bfloat16, else Storage. All pointers are contiguous rows.
template <class Storage, class Compute>
struct ForwardDirection {
  DirectionWeights weights;
  const Storage* hx;  // [B, output_size]
  const Storage* cx;  // [B, H], LSTM
  Storage* h_n;       // [B, output_size], or null: the output says it all
  Storage* c_n;       // [B, H], LSTM
  Storage* gates;     // [rows, saved_planes * H], or null: nothing is saved
  Compute* cells;     // [rows, H], LSTM, or null
};

template <class Storage, class Compute>
struct ForwardCall {
  LayerShape shape;
  const Schedule* schedule;
  int threads;
  const Storage* input;   // [rows, I]
  int64_t input_stride;   // elements from row to row; even, and zero-padded, for bfloat16
  Storage* output;        // [rows, directions * output_size]
  int64_t output_stride;  // of a layer between others it is the next one's input_stride; the caller writes the zeros
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
  Storage* grad_hx;  // null, as grad_cx: not wanted
  Storage* grad_cx;
  Storage* grad_weight_ih;  // null, as all below: not wanted
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

// The entry points of one instruction set. Those of bfloat16 are null where the machine multiplies no bfloat16. Forward
// takes a stack of layers, each of which has the output of the one before it as its input.
struct Kernels {
  const char* name;
  void (*forward_f32)(const ForwardCall<float, float>* layers, int64_t count);
  void (*forward_f64)(const ForwardCall<double, double>* layers, int64_t count);
  void (*forward_bf16)(const ForwardCall<BFloat16, float>* layers, int64_t count);
  void (*backward_f32)(const BackwardCall<float, float>&);
  void (*backward_f64)(const BackwardCall<double, double>&);
  void (*backward_bf16)(const BackwardCall<BFloat16, float>&);
};

// The kernels for this machine, or for RNNFAST_CPU_ISA; throws std::runtime_error when that names one it lacks.
const Kernels& kernels();

// PyTorch's number of threads; one in a forked child.
int usable_threads();

}  // namespace rnnfast
