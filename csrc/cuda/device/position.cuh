// Where a sequence stands at a time, for the three forms of rows of layer.h. For kernels that do one step at a time.
#pragma once

#include "cuda/device/primitives.cuh"
#include "cuda/layer.h"

namespace rnnfast::cuda {

struct Position {
  bool active, first, last;  // first, last: in the direction's order
  int64_t row, previous;     // previous: the row of the step before in that order; undefined where first
};

RNNFAST_DEVICE int64_t first_row(const Shape& shape, int64_t t) {
  return shape.offsets ? shape.offsets[t] : t * shape.batch;
}

RNNFAST_DEVICE int length_of(const Shape& shape, int b) { return shape.lengths ? shape.lengths[b] : shape.steps; }

RNNFAST_DEVICE Position position(const Shape& shape, int direction, int t, int b) {
  const int length = length_of(shape, b);
  Position at;
  at.active = t < length;
  at.first = direction ? t == length - 1 : t == 0;
  at.last = direction ? t == 0 : t == length - 1;
  at.row = first_row(shape, t) + b;
  at.previous = at.first || !at.active ? 0 : first_row(shape, direction ? t + 1 : t - 1) + b;
  return at;
}

}  // namespace rnnfast::cuda
