// Brings a batch into the layout of the kernels' rows (see cpu/layer.h), and results back. A packed batch has this
// layout already, and so has a padded batch without lengths. A batch with lengths is copied and sorted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/check_layer.h"
#include "cpu/layer.h"

namespace rnnfast {

class PackedLayout {
 public:
  // Checks the values of batch_sizes or lengths.
  PackedLayout(const LayerSizes& sizes, const Rows& rows) : batch_(sizes.batch), steps_(sizes.steps) {
    if (rows.batch_sizes)
      read_batch_sizes(*rows.batch_sizes, sizes);
    else if (rows.lengths)
      sort_by_length(*rows.lengths, sizes);
    else
      count_.assign(steps_, batch_);
    offset_.resize(count_.size());
    std::exclusive_scan(count_.begin(), count_.end(), offset_.begin(), int64_t(0));
  }

  Schedule schedule() const {
    const int64_t steps = int64_t(count_.size());
    return {steps, steps ? count_[0] : 0, steps ? offset_.back() + count_.back() : 0, count_.data(), offset_.data()};
  }

  // Whether the batch has lengths. Then the kernels work on sorted copies of input, output and states.
  bool sorted() const { return !order_.empty(); }

  // From [T, B, F] to [rows, F].
  Tensor pack(const Tensor& padded) const {
    Tensor packed = torch::stable::new_empty(padded, {schedule().total, padded.size(2)});
    move_rows(packed, padded, [](char* row, char* padding, size_t size) { std::memcpy(row, padding, size); });
    return packed;
  }

  // From [rows, F] to [T, B, F], with zeros where t >= length.
  Tensor unpack(const Tensor& packed) const {
    Tensor padded = torch::stable::new_zeros(packed, {steps_, batch_, packed.size(1)});
    move_rows(packed, padded, [](char* row, char* padding, size_t size) { std::memcpy(padding, row, size); });
    return padded;
  }

  // Sorts states [D, B, F] and leaves out those of empty sequences.
  Tensor gather(const Tensor& states) const {
    Tensor sorted = torch::stable::new_empty(states, {states.size(0), schedule().batch, states.size(2)});
    move_states(sorted, states, [](char* to, char* from, size_t size) { std::memcpy(to, from, size); });
    return sorted;
  }

  // Puts sorted states back into the order of the batch. An empty sequence gets its state in `initial`, or zeros.
  Tensor scatter(const Tensor& sorted, const std::optional<Tensor>& initial) const {
    Tensor states = initial ? torch::stable::clone(*initial)
                            : torch::stable::new_zeros(sorted, {sorted.size(0), batch_, sorted.size(2)});
    move_states(sorted, states, [](char* from, char* to, size_t size) { std::memcpy(to, from, size); });
    return states;
  }

 private:
  void read_batch_sizes(const Tensor& batch_sizes, const LayerSizes& sizes) {
    const HostValues values = check_batch_sizes(batch_sizes, sizes);
    count_.assign(values.data, values.data + values.count);
  }

  void sort_by_length(const Tensor& lengths, const LayerSizes& sizes) {
    check_lengths(lengths, sizes);
    RNNFAST_REQUIRE(lengths.is_cpu(), "lengths: expected a tensor on the device of input");
    const Tensor values = torch::stable::contiguous(torch::stable::to(lengths, torch::headeronly::ScalarType::Long));
    const int64_t* length = static_cast<const int64_t*>(values.const_data_ptr());
    check_length_values(length, sizes);
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
  std::vector<int64_t> count_, offset_;  // [T], of Schedule
  std::vector<int64_t> order_;  // [B]: the sequence at each place of the sorted batch; empty: nothing is sorted
};

}  // namespace rnnfast
