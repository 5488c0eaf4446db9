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

struct CellSpec {
  const char* operators;  // their names begin with this word: lstm_infer, lstm_step_fwd, ...
  int gates;              // per unit, in PyTorch's order
  int states;             // 1: h. 2: h and c
  int saved_planes;       // planes of width H that forward saves per row; 0: backward reads the output instead
  int grad_planes;        // planes of width H of gate gradients per row, in backward
  bool projectable;       // a layer may have weight_hr
  bool takes_relu;        // the operators have an argument `bool relu`
};

// A function, because device code cannot read a table of the host.
RNNFAST_INLINE constexpr CellSpec spec_of(Cell cell) {
  switch (cell) {
    case Cell::kRnn:
      return {.operators = "rnn",
              .gates = 1,
              .states = 1,
              .saved_planes = 0,
              .grad_planes = 1,
              .projectable = false,
              .takes_relu = true};
    case Cell::kGru:
      return {.operators = "gru",
              .gates = 3,  // r z n
              .states = 1,
              .saved_planes = 4,  // r z n and W_hn h + b_hn
              .grad_planes = 4,   // n_x r z n_h: the first three multiply x, the last three h
              .projectable = false,
              .takes_relu = false};
    default:
      return {.operators = "lstm",
              .gates = 4,  // i f g o
              .states = 2,
              .saved_planes = 4,  // i f g o
              .grad_planes = 4,
              .projectable = true,
              .takes_relu = false};
  }
}

RNNFAST_INLINE constexpr int gate_count(Cell cell) { return spec_of(cell).gates; }
RNNFAST_INLINE constexpr int saved_planes(Cell cell) { return spec_of(cell).saved_planes; }
RNNFAST_INLINE constexpr int grad_planes(Cell cell) { return spec_of(cell).grad_planes; }

// Whether the cell has the state c.
RNNFAST_INLINE constexpr bool has_c(Cell cell) { return spec_of(cell).states == 2; }

}  // namespace rnnfast
