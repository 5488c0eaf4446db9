// What is known of each cell, whatever its sizes. Every backend in C++ or CUDA reads it here; rnnfast/cells.py has the
// same facts for Python. The formulas of a step are in cell.h, the weights in weights.h.
#pragma once

#if defined(__CUDACC__)
#define RNNFAST_INLINE __host__ __device__ __forceinline__
#else
#define RNNFAST_INLINE inline __attribute__((always_inline))
#endif

namespace rnnfast {

enum class Cell { kRnn, kGru, kLstm };

// Gates per unit, in PyTorch's order: RNN has one, GRU r z n, LSTM i f g o.
//
// These three are expressions, not entries of the table: kernels call them with a cell that they learn at run time, and
// a switch over the table there cost two of them 16 bytes of spilled registers (sm_90, tier step).
RNNFAST_INLINE constexpr int gate_count(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }

// Planes of width H that forward saves per row: GRU r z n and W_hn h + b_hn, LSTM i f g o. With none, backward reads
// the output instead.
RNNFAST_INLINE constexpr int saved_planes(Cell cell) { return cell == Cell::kLstm || cell == Cell::kGru ? 4 : 0; }

// Planes of width H of gate gradients per row. GRU has n_x r z n_h: the first three multiply x, the last three h.
RNNFAST_INLINE constexpr int grad_planes(Cell cell) { return cell == Cell::kLstm || cell == Cell::kGru ? 4 : 1; }

struct CellSpec {
  const char* operators;  // their names begin with this word: lstm_infer, lstm_step_fwd, ...
  int gates, saved_planes, grad_planes;
  int states;        // 1: h. 2: h and c
  bool projectable;  // a layer may have weight_hr
  bool takes_relu;   // the operators have an argument `bool relu`
};

// A function, because device code cannot read a table of the host.
RNNFAST_INLINE constexpr CellSpec spec_of(Cell cell) {
  const int gates = gate_count(cell), saved = saved_planes(cell), grad = grad_planes(cell);
  switch (cell) {
    case Cell::kRnn:
      return {.operators = "rnn",
              .gates = gates,
              .saved_planes = saved,
              .grad_planes = grad,
              .states = 1,
              .projectable = false,
              .takes_relu = true};
    case Cell::kGru:
      return {.operators = "gru",
              .gates = gates,
              .saved_planes = saved,
              .grad_planes = grad,
              .states = 1,
              .projectable = false,
              .takes_relu = false};
    default:
      return {.operators = "lstm",
              .gates = gates,
              .saved_planes = saved,
              .grad_planes = grad,
              .states = 2,
              .projectable = true,
              .takes_relu = false};
  }
}

// Whether the cell has the state c.
RNNFAST_INLINE constexpr bool has_c(Cell cell) { return cell == Cell::kLstm; }

}  // namespace rnnfast
