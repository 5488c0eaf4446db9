// Registers the operators for CPU tensors.
#include <string>

#include "common/operators.h"
#include "cpu/layer.h"

namespace rnnfast {
namespace {

std::string cpu_isa() { return kernels().name; }

}  // namespace
}  // namespace rnnfast

// The schemas are defined in rnnfast/ops.py.
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) { rnnfast::implement_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&rnnfast::cpu_isa)); }
