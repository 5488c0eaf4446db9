// The small kernels around the recurrence (around.h).
//
// Ownership   One thread per number, or a warp per row. Larger counts than the largest grid take several rounds.
// Sync        None, and no shared memory.
#include "cuda/device/around.h"

#include <algorithm>

#include "cuda/device/math.cuh"
#include "cuda/device/position.cuh"
#include "cuda/device/primitives.cuh"
#include "cuda/plan/plan.h"

namespace rnnfast::cuda {
namespace {

constexpr int kThreads = 256, kWarp = 32;

// One thread per number.
template <class... Parameters, class... Args>
cudaError_t launch_over(int64_t count, cudaStream_t stream, void (*kernel)(Parameters...), const Args&... args) {
  const int64_t blocks = std::clamp(divide_up(count, kThreads), int64_t(1), int64_t(1) << 20);
  return launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 1, false, 0, stream, args...);
}

RNNFAST_DEVICE int64_t first_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
RNNFAST_DEVICE int64_t index_stride() { return int64_t(gridDim.x) * kThreads; }

// Calls run(value) with a value of the arithmetic's element type.
template <class Run>
cudaError_t with_element(Arithmetic arithmetic, Run&& run) {
  switch (arithmetic) {
    case Arithmetic::kBfloat16:
      return run(__nv_bfloat16());
    case Arithmetic::kHalf:
      return run(__half());
    case Arithmetic::kTf32:
    case Arithmetic::kExact:
      return run(float());
  }
  return cudaErrorInvalidConfiguration;
}

template <class Element>
__global__ void __launch_bounds__(kThreads) sum_biases_kernel(const __grid_constant__ BiasSum call, Element* sums) {
  const int64_t size = int64_t(gate_count(call.cell)) * call.hidden_size;
  for (int64_t i = first_index(); i < call.directions * size; i += index_stride()) {
    const int64_t d = i / size, row = i % size;
    float sum = to_float(static_cast<const Element*>(call.bias_ih[d])[row]);
    if (call.cell != Cell::kGru || row < 2 * int64_t(call.hidden_size))
      sum += to_float(static_cast<const Element*>(call.bias_hh[d])[row]);
    sums[i] = from_float<Element>(sum);
  }
}

template <class Length>
__global__ void __launch_bounds__(kThreads)
    clamp_lengths_kernel(const Length* lengths, int32_t* clamped, int batch, int steps) {
  for (int64_t b = first_index(); b < batch; b += index_stride()) {
    const Length length = lengths[b];
    clamped[b] = length < 0 ? 0 : length > steps ? steps : int32_t(length);
  }
}

// kChunk batch sizes as a kernel's argument. Every device takes 4 KiB of arguments.
constexpr int kChunk = 256;
struct BatchSizes {
  int64_t first_step, first_row;
  int64_t count, following;  // number of sizes; the batch size after them, 0 at the end
  int32_t sizes[kChunk];
  int64_t rows_before[kChunk];  // of first_row
};

__global__ void __launch_bounds__(kThreads)
    write_schedule_kernel(const __grid_constant__ BatchSizes chunk, int64_t* offsets, int32_t* lengths) {
  for (int64_t i = first_index(); i < chunk.count; i += index_stride())
    offsets[chunk.first_step + i] = chunk.first_row + chunk.rows_before[i];
  // Sequences that end within the chunk. Sizes fall, so sequence b takes part in the steps whose size exceeds b.
  for (int64_t b = chunk.following + first_index(); b < chunk.sizes[0]; b += index_stride()) {
    int steps = 0;
    for (int bit = kChunk / 2; bit; bit /= 2)
      if (steps + bit <= chunk.count && chunk.sizes[steps + bit - 1] > b) steps += bit;
    if (steps < chunk.count && chunk.sizes[steps] > b) ++steps;
    lengths[b] = int32_t(chunk.first_step) + steps;
  }
}

// Copies a row by the lanes of a warp. from: null for zeros.
template <class Piece>
RNNFAST_DEVICE void copy_row(Piece* to, const Piece* from, int64_t count) {
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) to[i] = from ? from[i] : Piece{};
}

// A warp per row, because finding a row takes divisions. Pieces have 16 bytes where all rows are aligned to that.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    gather_previous_kernel(const __grid_constant__ Shape shape, const Element* output, const Element* hx,
                           Element* previous) {
  const int64_t P = shape.output_size, B = shape.batch, each = shape.steps * B, bytes = P * int64_t(sizeof(Element));
  const uintptr_t addresses = uintptr_t(output) | uintptr_t(hx) | uintptr_t(previous);
  const bool aligned = (addresses | uintptr_t(bytes)) % sizeof(uint4) == 0;
  for (int64_t i = first_index() / kWarp; i < shape.directions * each; i += index_stride() / kWarp) {
    const int64_t d = i / each;
    const int b = int(i % B), t = int(i % each / B);
    const Position at = position(shape, int(d), t, b);
    if (!at.active && shape.offsets) continue;
    const Element* from = nullptr;
    if (at.active && !at.first)
      from = output + (at.previous * shape.directions + d) * P;
    else if (at.active && hx)
      from = hx + (d * B + b) * P;
    Element* const to = previous + (d * shape.rows + at.row) * P;
    if (aligned)
      copy_row(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(from), bytes / int64_t(sizeof(uint4)));
    else
      copy_row(to, from, P);
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    cell_outputs_kernel(const __grid_constant__ Shape shape, const Element* gates, const float* c,
                        Element* unprojected) {
  const int64_t H = shape.hidden_size;
  for (int64_t i = first_index(); i < shape.directions * shape.rows * H; i += index_stride())
    unprojected[i] = from_float<Element>(to_float(gates[i / H * 4 * H + 3 * H + i % H]) * ExactMath::tanh(c[i]));
}

}  // namespace

cudaError_t sum_biases(const BiasSum& call, cudaStream_t stream) {
  const int64_t count = int64_t(call.directions) * gate_count(call.cell) * call.hidden_size;
  return with_element(call.arithmetic, [&](auto element) {
    using Element = decltype(element);
    return launch_over(count, stream, sum_biases_kernel<Element>, call, static_cast<Element*>(call.sums));
  });
}

cudaError_t clamp_lengths(const void* lengths, bool wide, int32_t* clamped, int batch, int steps, cudaStream_t stream) {
  return wide ? launch_over(batch, stream, clamp_lengths_kernel<int64_t>, static_cast<const int64_t*>(lengths), clamped,
                            batch, steps)
              : launch_over(batch, stream, clamp_lengths_kernel<int32_t>, static_cast<const int32_t*>(lengths), clamped,
                            batch, steps);
}

cudaError_t write_schedule(const int64_t* batch_sizes, int64_t steps, int64_t* offsets, int32_t* lengths,
                           cudaStream_t stream) {
  BatchSizes chunk{};
  for (int64_t t = 0; t < steps; t += kChunk) {
    chunk.first_step = t;
    chunk.count = std::min(int64_t(kChunk), steps - t);
    int64_t rows = 0;
    for (int64_t i = 0; i < chunk.count; ++i) {
      chunk.sizes[i] = int32_t(batch_sizes[t + i]);
      chunk.rows_before[i] = rows;
      rows += batch_sizes[t + i];
    }
    chunk.following = t + kChunk < steps ? batch_sizes[t + kChunk] : 0;
    const int64_t ending = batch_sizes[t] - chunk.following;
    const cudaError_t error =
        launch_over(std::max(chunk.count, ending), stream, write_schedule_kernel, chunk, offsets, lengths);
    if (error != cudaSuccess) return error;
    chunk.first_row += rows;
  }
  return cudaSuccess;
}

cudaError_t gather_previous(Arithmetic arithmetic, const Shape& shape, const void* output, const void* hx,
                            void* previous, cudaStream_t stream) {
  const int64_t count = int64_t(shape.directions) * shape.steps * shape.batch * kWarp;
  return with_element(arithmetic, [&](auto element) {
    using Element = decltype(element);
    return launch_over(count, stream, gather_previous_kernel<Element>, shape, static_cast<const Element*>(output),
                       static_cast<const Element*>(hx), static_cast<Element*>(previous));
  });
}

cudaError_t cell_outputs(Arithmetic arithmetic, const Shape& shape, const void* gates, const float* c,
                         void* unprojected, cudaStream_t stream) {
  const int64_t count = shape.directions * shape.rows * shape.hidden_size;
  return with_element(arithmetic, [&](auto element) {
    using Element = decltype(element);
    return launch_over(count, stream, cell_outputs_kernel<Element>, shape, static_cast<const Element*>(gates), c,
                       static_cast<Element*>(unprojected));
  });
}

}  // namespace rnnfast::cuda
