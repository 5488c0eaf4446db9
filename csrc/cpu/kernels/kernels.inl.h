// Everything that is compiled once per instruction set: all files of this folder.
//
// An isa_*.cpp has the flags of its set. It defines RNNFAST_ISA (the namespace), RNNFAST_NAME, RNNFAST_VECTOR_BYTES and
// RNNFAST_VECTOR_REGISTERS. Tests of single parts (tests/kernels) define RNNFAST_PARTS_ONLY and include that file.
//
// Nothing outside the namespace may be emitted as a shared (weak) symbol: the linker could keep this copy for machines
// that lack its instructions. So the kernels use no std containers, and all their headers are inside the namespace.
#include <omp.h>
#include <sched.h>
#include <time.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "cpu/frozen.h"
#include "cpu/layer.h"

namespace rnnfast::RNNFAST_ISA {
// clang-format off: each needs those above it
#include "cpu/kernels/workspace.h"
#include "cpu/kernels/contention.h"
#include "cpu/kernels/threads.h"
#include "cpu/kernels/vec.h"
#include "cpu/kernels/tile_size.h"
#include "cpu/kernels/elements.h"
#include "cpu/kernels/panels.inl.h"
#include "cpu/kernels/tile_product.inl.h"
#include "cpu/kernels/direct.inl.h"
#include "cpu/kernels/forward_plan.inl.h"
#include "cpu/kernels/forward_layer.inl.h"
#include "cpu/kernels/forward_prepare.inl.h"
#include "cpu/kernels/cell_rows.inl.h"
#include "cpu/kernels/whole_row.inl.h"
#include "cpu/kernels/forward_step.inl.h"
#include "cpu/kernels/forward.inl.h"
#include "cpu/kernels/wavefront.inl.h"
#include "cpu/kernels/outer_sum.inl.h"
#include "cpu/kernels/stretches.h"
#include "cpu/kernels/step_backward.inl.h"
#include "cpu/kernels/backward_layer.inl.h"
#include "cpu/kernels/backward_prepare.inl.h"
#include "cpu/kernels/backward_step.inl.h"
#include "cpu/kernels/backward_sums.inl.h"
#include "cpu/kernels/backward.inl.h"
#include "cpu/kernels/frozen/formats.inl.h"
#include "cpu/kernels/frozen/activations.inl.h"
#include "cpu/kernels/frozen/tile.inl.h"
#include "cpu/kernels/frozen/forward.inl.h"
// clang-format on

#if defined(RNNFAST_PARTS_ONLY)  // the tests of the kernels' parts (tests/kernels)
#elif defined(RNNFAST_INT8_ONLY)
extern const FrozenKernels kFrozen;
const FrozenKernels kFrozen = {RNNFAST_NAME, nullptr, nullptr, run_frozen<FrozenInt8>};
#elif defined(RNNFAST_BF16_ONLY)
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
const Kernels kKernels = {
    RNNFAST_NAME, nullptr, nullptr, forward_stack<BFloat16>, nullptr, nullptr, backward_layer<BFloat16>};
const FrozenKernels kFrozen = {RNNFAST_NAME, nullptr, run_frozen<FrozenBFloat16>, nullptr};
#else
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
const Kernels kKernels = {RNNFAST_NAME, forward_stack<float>,  forward_stack<double>,
                          nullptr,      backward_layer<float>, backward_layer<double>,
                          nullptr};
const FrozenKernels kFrozen = {RNNFAST_NAME, run_frozen<FrozenFloat32>, run_frozen<FrozenBFloat16>,
                               run_frozen<FrozenInt8>};
#endif
}  // namespace rnnfast::RNNFAST_ISA
