// The weights of a layer by role. Nothing else counts weights or knows their order.
//
// To add a role: name it in WeightRole, say in layout_of when a layer has it, give its shape in check_layer.h, and add
// its name to LayerWeights.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/cell_spec.h"

namespace rnnfast {

using torch::stable::Tensor;

// In the order in which a direction's weights stand in an operator's list.
enum class WeightRole : int8_t { kWeightIh, kWeightHh, kBiasIh, kBiasHh, kWeightHr };
constexpr int kWeightRoles = 5;

// Which weights a layer has. Its list holds direction after direction. A stack's list holds layer after layer.
struct WeightLayout {
  int64_t directions;
  int64_t count = 0;                          // weights per direction
  std::array<WeightRole, kWeightRoles> role;  // [count]
  std::array<int8_t, kWeightRoles> place;     // index of each role in a direction; -1: the layer lacks this role

  constexpr explicit WeightLayout(int64_t of_directions) : directions(of_directions), role{} { place.fill(-1); }
  constexpr void add(WeightRole next) {
    place[size_t(next)] = int8_t(count);
    role[size_t(count++)] = next;
  }
  constexpr bool has(WeightRole wanted) const { return place[size_t(wanted)] >= 0; }
  constexpr int64_t per_layer() const { return directions * count; }
};

// Finds the roles of one layer's weights from their number and the rank of the third. Null: no layer of the cell has so
// many. The third of four weights is bias_ih, a vector, in one direction with biases. It is weight_ih of direction 1, a
// matrix, in two directions without biases.
constexpr std::optional<WeightLayout> layout_of(Cell cell, int64_t total, bool third_is_matrix) {
  WeightLayout layout(total > kWeightRoles || (total == 4 && third_is_matrix) ? 2 : 1);
  const int64_t each = total / layout.directions;
  const bool biases = each >= 4, projected = each % 2 == 1;
  layout.add(WeightRole::kWeightIh);
  layout.add(WeightRole::kWeightHh);
  if (biases) {
    layout.add(WeightRole::kBiasIh);
    layout.add(WeightRole::kBiasHh);
  }
  if (projected) layout.add(WeightRole::kWeightHr);
  if (layout.per_layer() != total || (projected && !spec_of(cell).projectable)) return std::nullopt;
  return layout;
}

// Reads a list of weights, or of their gradients, by direction and role. In a stack, direction d of layer k has the
// number k * directions + d, as in hx. A LayerWeights refers to the layout and to the list; both must outlive it.
class LayerWeights {
 public:
  LayerWeights(const WeightLayout& layout, const std::vector<Tensor>& list) : layout_(layout), list_(list.data()) {}

  // A layer without biases has neither bias_ih nor bias_hh; only a projected one has weight_hr.
  bool has_biases() const { return layout_.has(WeightRole::kBiasIh); }
  bool is_projected() const { return layout_.has(WeightRole::kWeightHr); }

  const Tensor& weight_ih(int64_t direction) const { return at(direction, WeightRole::kWeightIh); }
  const Tensor& weight_hh(int64_t direction) const { return at(direction, WeightRole::kWeightHh); }
  const Tensor& bias_ih(int64_t direction) const { return at(direction, WeightRole::kBiasIh); }
  const Tensor& bias_hh(int64_t direction) const { return at(direction, WeightRole::kBiasHh); }
  const Tensor& weight_hr(int64_t direction) const { return at(direction, WeightRole::kWeightHr); }

 private:
  const Tensor& at(int64_t direction, WeightRole role) const {
    return list_[direction * layout_.count + layout_.place[size_t(role)]];
  }

  const WeightLayout& layout_;
  const Tensor* const list_;
};

}  // namespace rnnfast
