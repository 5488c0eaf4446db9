// Everything that is compiled once per instruction set. An isa_*.cpp defines RNNFAST_ISA (its namespace) and
// RNNFAST_VECTOR_BYTES, and is compiled with that set's flags. Nothing outside that namespace may be emitted here as a
// shared (weak) symbol, or the linker could keep this copy for older machines: no std containers, all headers inside.
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
#include "cpu/kernels/team.h"
#include "cpu/kernels/vec.h"
#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/direct.inl.h"
#include "cpu/kernels/plan.inl.h"
#include "cpu/kernels/cell_rows.inl.h"
#include "cpu/kernels/forward.inl.h"
#include "cpu/kernels/wavefront.inl.h"
#include "cpu/kernels/outer_sum.inl.h"
#include "cpu/kernels/stretches.h"
#include "cpu/kernels/step_backward.inl.h"
#include "cpu/kernels/backward.inl.h"
#include "cpu/kernels/frozen/formats.inl.h"
#include "cpu/kernels/frozen/activations.inl.h"
#include "cpu/kernels/frozen/tile.inl.h"
#include "cpu/kernels/frozen/forward.inl.h"
// clang-format on

#if defined(RNNFAST_INT8_ONLY)
extern const FrozenKernels kFrozen;
const FrozenKernels kFrozen = {RNNFAST_NAME, nullptr, nullptr, run_frozen<FrozenInt8>};
#else
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
#if defined(RNNFAST_BF16_ONLY)
const Kernels kKernels = {RNNFAST_NAME, nullptr, nullptr, forward<BFloat16>, nullptr, nullptr, backward<BFloat16>};
const FrozenKernels kFrozen = {RNNFAST_NAME, nullptr, run_frozen<FrozenBFloat16>, nullptr};
#else
const Kernels kKernels = {RNNFAST_NAME,    forward<float>,   forward<double>, nullptr,
                          backward<float>, backward<double>, nullptr};
const FrozenKernels kFrozen = {RNNFAST_NAME, run_frozen<FrozenFloat32>, run_frozen<FrozenBFloat16>,
                               run_frozen<FrozenInt8>};
#endif
#endif
}  // namespace rnnfast::RNNFAST_ISA
