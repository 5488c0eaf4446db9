// From the three forms of a batch (padded, packed, padded with lengths) to the kernels' packed rows, and back.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/layer.h"

namespace rnnfast {

class Rows {
 public:
  Rows(const LayerSizes& sizes, const std::optional<Tensor>& batch_sizes, const std::optional<Tensor>& lengths)
      : batch_(sizes.batch), steps_(sizes.steps) {
    if (batch_sizes)
      from_batch_sizes(*batch_sizes, sizes);
    else if (lengths)
      from_lengths(*lengths, sizes);
    else
      count_.assign(steps_, batch_);
    offset_.resize(count_.size());
    std::exclusive_scan(count_.begin(), count_.end(), offset_.begin(), int64_t(0));
  }

  Schedule schedule() const {
    const int64_t steps = int64_t(count_.size());
    return {steps, steps ? count_[0] : 0, steps ? offset_.back() + count_.back() : 0, count_.data(), offset_.data()};
  }

  // Sequences were sorted, and input, output and states are the kernels' own copies.
  bool sorted() const { return !order_.empty(); }

  // [T, B, F] -> [rows, F], the rows of time t in order of falling length.
  Tensor pack(const Tensor& padded) const {
    const Schedule rows = schedule();
    Tensor packed = torch::stable::new_empty(padded, {rows.total, padded.size(2)});
    move_rows(packed, padded, [](char* row, char* padding, size_t size) { std::memcpy(row, padding, size); });
    return packed;
  }

  // The reverse; zero where no row is.
  Tensor unpack(const Tensor& packed) const {
    Tensor padded = torch::stable::new_zeros(packed, {steps_, batch_, packed.size(1)});
    move_rows(packed, padded, [](char* row, char* padding, size_t size) { std::memcpy(padding, row, size); });
    return padded;
  }

  // [D, B, F] states in sorted order, without those of empty sequences.
  Tensor gather(const Tensor& states) const {
    Tensor sorted = torch::stable::new_empty(states, {states.size(0), schedule().batch, states.size(2)});
    move_states(sorted, states, [](char* to, char* from, size_t size) { std::memcpy(to, from, size); });
    return sorted;
  }

  // The reverse; an empty sequence keeps the row of `initial`, or zero.
  Tensor scatter(const Tensor& sorted, const std::optional<Tensor>& initial) const {
    Tensor states = initial ? torch::stable::clone(*initial)
                            : torch::stable::new_zeros(sorted, {sorted.size(0), batch_, sorted.size(2)});
    move_states(sorted, states, [](char* from, char* to, size_t size) { std::memcpy(to, from, size); });
    return states;
  }

 private:
  void from_batch_sizes(const Tensor& batch_sizes, const LayerSizes& sizes) {
    RNNFAST_REQUIRE(batch_sizes.is_cpu() && batch_sizes.scalar_type() == torch::headeronly::ScalarType::Long &&
                        batch_sizes.dim() == 1,
                    "batch_sizes: expected a one-dimensional int64 tensor on the CPU");
    check_memory(batch_sizes, Facts(batch_sizes), {"batch_sizes"});
    const Tensor contiguous = torch::stable::contiguous(batch_sizes);
    const int64_t* values = static_cast<const int64_t*>(contiguous.const_data_ptr());
    count_.assign(values, values + contiguous.numel());
    int64_t total = 0, limit = batch_;
    for (const int64_t count : count_) {
      RNNFAST_REQUIRE(count > 0 && count <= limit, "batch_sizes: expected positive sizes in descending order, at most ",
                      batch_, ", got ", count);
      limit = count;
      total += count;
    }
    RNNFAST_REQUIRE((count_.empty() || count_[0] == batch_) && total == sizes.rows,
                    "batch_sizes: expected the first to be the batch of hx (", batch_,
                    ") and their sum to be the rows of input (", sizes.rows, "), got ", count_.empty() ? 0 : count_[0],
                    " and ", total);
  }

  void from_lengths(const Tensor& lengths, const LayerSizes& sizes) {
    using torch::headeronly::ScalarType;
    check_shape(lengths, {batch_}, {"lengths"});
    RNNFAST_REQUIRE(lengths.is_cpu(), "lengths: expected a tensor on the device of input");
    RNNFAST_REQUIRE(lengths.scalar_type() == ScalarType::Long || lengths.scalar_type() == ScalarType::Int,
                    "lengths: expected int32 or int64, got ", toString(lengths.scalar_type()));
    const Tensor values = torch::stable::contiguous(torch::stable::to(lengths, ScalarType::Long));
    const int64_t* length = static_cast<const int64_t*>(values.const_data_ptr());
    for (int64_t b = 0; b < batch_; ++b)
      RNNFAST_REQUIRE(length[b] >= 0 && length[b] <= sizes.steps, "lengths: expected values from 0 to ", sizes.steps,
                      ", got ", length[b]);
    order_.resize(batch_);
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    int64_t active = batch_;
    for (int64_t t = 0; t < steps_; ++t) {
      while (active > 0 && length[order_[active - 1]] <= t) --active;
      if (active == 0) break;
      count_.push_back(active);
    }
  }

  template <class Move>
  void move_rows(const Tensor& packed, const Tensor& padded, Move&& move) const {
    const Tensor source = torch::stable::contiguous(padded);
    const size_t size = size_t(packed.size(1)) * packed.element_size();
    char* const rows = static_cast<char*>(packed.data_ptr());
    char* const padding = static_cast<char*>(source.data_ptr());
    for (size_t t = 0; t < count_.size(); ++t)
      for (int64_t j = 0; j < count_[t]; ++j)
        move(rows + (offset_[t] + j) * size, padding + (int64_t(t) * batch_ + order_[j]) * size, size);
  }

  template <class Move>
  void move_states(const Tensor& sorted, const Tensor& states, Move&& move) const {
    const Tensor source = torch::stable::contiguous(states);
    const size_t size = size_t(sorted.size(2)) * sorted.element_size();
    for (int64_t d = 0; d < sorted.size(0); ++d)
      for (int64_t j = 0; j < sorted.size(1); ++j)
        move(static_cast<char*>(sorted.data_ptr()) + (d * sorted.size(1) + j) * size,
             static_cast<char*>(source.data_ptr()) + (d * batch_ + order_[j]) * size, size);
  }

  int64_t batch_, steps_;
  std::vector<int64_t> count_, offset_;
  std::vector<int64_t> order_;  // sequence of each sorted place; empty: the user's own order
};

}  // namespace rnnfast
