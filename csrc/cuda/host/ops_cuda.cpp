// Registers the operators for CUDA tensors. The emulator's library registers them for CPU tensors, in its own
// namespace.
#include <string>

#include "common/operators.h"
#include "cuda/host/host.h"

namespace rnnfast {
namespace {

// The cell whose operators have this name.
Cell cell_of(const std::string& operators) {
  for (const Cell cell : {Cell::kRnn, Cell::kGru})
    if (operators == spec_of(cell).operators) return cell;
  return Cell::kLstm;
}

// Describes the plan of a layer: the tier, its tile, and why the tiers before it were passed over. The text begins with
// "refused: " if no tier takes the layer.
std::string plan_text(std::string cell, std::string dtype, int64_t hidden_size, int64_t proj_size, int64_t batch,
                      int64_t directions, bool backward, int64_t device) {
  using namespace cuda;
  using torch::headeronly::ScalarType;
  if (dtype != "bfloat16" && dtype != "float16" && dtype != "float32") return "refused: it has no kernel for " + dtype;
  const ScalarType type = dtype == "bfloat16"  ? ScalarType::BFloat16
                          : dtype == "float16" ? ScalarType::Half
                                               : ScalarType::Float;
  const DeviceLimits limits = limits_of(int32_t(device));
  const DeviceGuard guard(static_cast<int32_t>(device));
  Shape shape{};
  shape.cell = cell_of(cell);
  shape.hidden_size = int(hidden_size);
  shape.output_size = int(proj_size > 0 ? proj_size : hidden_size);
  shape.batch = int(batch);
  shape.directions = int(directions);
  const Choice choice = find_plan({arithmetic_of(type, limits), backward, proj_size > 0, shape}, limits);
  const std::string why = choice.why();
  if (!choice.found) return "refused: " + why;
  const Plan& plan = choice.plan;
  return std::string("tier ") + kTierNames[int(plan.tier)] + ": " + std::to_string(plan.tile_units) + " units x " +
         std::to_string(plan.tile_batch) + " rows per CTA, weight_hh over " + std::to_string(plan.ctas) + " CTAs" +
         (why.empty() ? "" : "; not " + why);
}

void allow_tf32(bool allow) { cuda::set_allow_tf32(allow); }

}  // namespace
}  // namespace rnnfast

#if defined(RNNFAST_EMULATOR)
#define RNNFAST_NAMESPACE rnnfast_emulator
#define RNNFAST_KEY CPU
#else
#define RNNFAST_NAMESPACE rnnfast
#define RNNFAST_KEY CUDA
#endif

// The stable ABI's macros join their arguments to other names. These macros expand the arguments first.
#define RNNFAST_IMPLEMENT(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define RNNFAST_EXTEND(space, m) STABLE_TORCH_LIBRARY_FRAGMENT(space, m)

// rnnfast/ops.py defines the schemas of the layers. Only this library has these two operators.
RNNFAST_EXTEND(RNNFAST_NAMESPACE, m) {
  m.def(
      "_cuda_plan(str cell, str dtype, int hidden_size, int proj_size, int batch, int directions, bool backward, "
      "int device) -> str");
  m.def("_cuda_allow_tf32(bool allow) -> ()");
}
RNNFAST_IMPLEMENT(RNNFAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("_cuda_plan", TORCH_BOX(&rnnfast::plan_text));
  m.impl("_cuda_allow_tf32", TORCH_BOX(&rnnfast::allow_tf32));
}
RNNFAST_IMPLEMENT(RNNFAST_NAMESPACE, RNNFAST_KEY, m) { rnnfast::implement_operators(m); }
