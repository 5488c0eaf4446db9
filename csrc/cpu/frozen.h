// What a call of a frozen stack of layers hands to the kernels: raw pointers into one block of packed weights.
//
// Packed block   [header][layer 0, direction 0][layer 0, direction 1][layer 1, direction 0]...
// A direction    W_ih, W_hh, W_hr (only with a projection), bias, bias_hidden
// A matrix       panel, then for int8: scale, sum
//   panel        [vector block][step of k][vector][16 lanes][4 bytes]; the 4 bytes are 1 float, 2 bfloat16 or 4 int8 of
//                consecutive k. A vector has 16 consecutive units of one gate.
//   scale, sum   [vector][16 lanes], float and int32: W = scale * int8; sum = the sum of the int8 of a row of W
//   bias         [vector of W_ih][16 lanes]: b_ih + b_hh; GRU's n has b_ih alone
//   bias_hidden  [vector of units][16 lanes]: GRU's b_hh of n; other cells have none
// Every part begins at a multiple of 64 bytes. rnnfast/packing.py writes the block. It is the same for every machine.
#pragma once

#include <cstdint>

#include "cpu/layer.h"

namespace rnnfast {

enum class WeightFormat : int64_t { kFloat32, kBFloat16, kInt8 };

// The first bytes of a packed block.
struct PackedHeader {
  static constexpr int64_t kMagic = 0x31'7a72'665f'6e72;  // changes with the layout
  int64_t magic;
  int64_t format;  // WeightFormat
  int64_t cell;    // Cell
  int64_t relu;
  int64_t input_size, hidden_size, proj_size, directions, layers;
  int64_t bytes;  // of the whole block
  int64_t unused[6];
};
static_assert(sizeof(PackedHeader) == 128);

constexpr int64_t kPackedLanes = 16;

// How the rows of a matrix, `gates` blocks of `units`, are cut into vectors. With gates a block of vectors has those of
// 16 units, gate after gate. Without, it has up to 4 vectors of units, and blocks are as even as they can be.
struct PackedShape {
  static constexpr int64_t kMostVectors = 4;
  int64_t units, depth;
  int gates;
  WeightFormat format;

  int64_t unit_vectors() const { return (units + kPackedLanes - 1) / kPackedLanes; }
  int64_t blocks() const { return gates > 1 ? unit_vectors() : (unit_vectors() + kMostVectors - 1) / kMostVectors; }
  int64_t vectors() const { return unit_vectors() * gates; }
  // Vectors before a block; unit vectors before a block.
  int64_t position(int64_t block) const { return gates > 1 ? block * gates : first_unit_vector(block); }
  int64_t first_unit_vector(int64_t block) const { return gates > 1 ? block : block * unit_vectors() / blocks(); }
  int width(int64_t block) const { return int(position(block + 1) - position(block)); }
  // k that one step multiplies, and the number of steps.
  int step_depth() const { return format == WeightFormat::kFloat32 ? 1 : format == WeightFormat::kBFloat16 ? 2 : 4; }
  int64_t steps() const { return (depth + step_depth() - 1) / step_depth(); }
  int64_t padded_depth() const { return steps() * step_depth(); }
  int64_t panel_bytes() const { return vectors() * steps() * kPackedLanes * 4; }
  int64_t bytes() const {
    return panel_bytes() + (format == WeightFormat::kInt8 ? 2 * vectors() * kPackedLanes * 4 : 0);
  }
};

struct PackedMatrix {
  PackedShape shape;
  const char* panel = nullptr;  // null: there is no such matrix
  const float* scale = nullptr;
  const int32_t* sum = nullptr;
};

struct FrozenDirection {
  PackedMatrix ih, hh, hr;
  const float* bias;
  const float* bias_hidden;  // GRU
  const float* hx;           // [B, output_size]; null: zeros, and W_hh is not read at the first step
  const float* cx;           // [B, H], LSTM; null: zeros
  float* h_n;                // [B, output_size]
  float* c_n;                // [B, H], LSTM
};

struct FrozenCall {
  LayerShape shape;
  const Schedule* schedule;
  int threads;
  bool wide_activations;  // int8: activations have 16 bits in place of 8
  const float* input;     // [rows, input_size]
  float* output;          // [rows, directions * output_size]
  FrozenDirection direction[2];
};

using FrozenKernel = void (*)(const FrozenCall* layers, int64_t count);

// The kernels of one instruction set; null: it has none of that format.
struct FrozenKernels {
  const char* name;
  FrozenKernel float32, bfloat16, int8;
};

// The best kernel for a format on this machine, or on what RNNFAST_CPU_ISA names. Sets *name to its instruction set.
FrozenKernel frozen_kernel(WeightFormat format, const char** name);

}  // namespace rnnfast
