// Chooses the instruction set once per process, and the number of threads at every call.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <omp.h>
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/frozen.h"
#include "cpu/layer.h"

namespace rnnfast {

namespace base {
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
}  // namespace base
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
}  // namespace avx2
namespace avx512 {
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
}  // namespace avx512
namespace avx2_vnni {
extern const FrozenKernels kFrozen;
}
namespace avx512_vnni {
extern const FrozenKernels kFrozen;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
}  // namespace avx512_bf16
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
extern const FrozenKernels kFrozen;
}  // namespace neon
#endif

namespace {

#if defined(__x86_64__)
// AVX-VNNI: leaf 7, subleaf 1, EAX bit 4. GCC 12 has no name for it in __builtin_cpu_supports.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

// The kernels that this machine can run, the slowest first.
std::vector<Kernels> available() {
  std::vector<Kernels> sets = {base::kKernels};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(avx2::kKernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    sets.push_back(avx512::kKernels);
    if (__builtin_cpu_supports("avx512bf16")) {
      sets.push_back(avx512::kKernels);
      sets.back().name = avx512_bf16::kKernels.name;
      sets.back().forward_bf16 = avx512_bf16::kKernels.forward_bf16;
      sets.back().backward_bf16 = avx512_bf16::kKernels.backward_bf16;
    }
  }
#elif defined(__aarch64__)
  sets.push_back(neon::kKernels);
#endif
  return sets;
}

Kernels choose() {
  const std::vector<Kernels> sets = available();
  const char* const wanted = std::getenv("RNNFAST_CPU_ISA");
  if (!wanted || !*wanted) return sets.back();
  std::string names;
  for (const Kernels& set : sets) {
    if (std::string(wanted) == set.name) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("RNNFAST_CPU_ISA=" + std::string(wanted) + ": this machine has " + names);
}

// Every set that this machine can run, fastest first.
std::vector<FrozenKernels> available_frozen() {
  std::vector<FrozenKernels> sets;
#if defined(__x86_64__)
  const bool avx2_too = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_too = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512_too && __builtin_cpu_supports("avx512bf16")) sets.push_back(avx512_bf16::kFrozen);
  if (avx512_too && __builtin_cpu_supports("avx512vnni")) sets.push_back(avx512_vnni::kFrozen);
  if (avx512_too) sets.push_back(avx512::kFrozen);
  if (avx2_too && has_avx_vnni()) sets.push_back(avx2_vnni::kFrozen);
  if (avx2_too) sets.push_back(avx2::kFrozen);
#elif defined(__aarch64__)
  sets.push_back(neon::kFrozen);
#endif
  sets.push_back(base::kFrozen);
  return sets;
}

// The sets that may run: all from the one that RNNFAST_CPU_ISA names downwards.
std::vector<FrozenKernels> chosen_frozen() {
  std::vector<FrozenKernels> sets = available_frozen();
  const char* const wanted = std::getenv("RNNFAST_CPU_ISA");
  if (!wanted || !*wanted) return sets;
  std::string names;
  for (size_t i = 0; i < sets.size(); ++i) {
    if (std::string(wanted) == sets[i].name) return {sets.begin() + i, sets.end()};
    names += (names.empty() ? "" : ", ") + std::string(sets[i].name);
  }
  throw std::runtime_error("RNNFAST_CPU_ISA=" + std::string(wanted) + ": this machine has " + names);
}

std::atomic<bool> in_forked_child{false};

}  // namespace

FrozenKernel frozen_kernel(WeightFormat format, const char** name) {
  static const std::vector<FrozenKernels> sets = chosen_frozen();
  for (const FrozenKernels& set : sets) {
    const FrozenKernel kernel = format == WeightFormat::kFloat32    ? set.float32
                                : format == WeightFormat::kBFloat16 ? set.bfloat16
                                                                    : set.int8;
    if (!kernel) continue;
    *name = set.name;
    return kernel;
  }
  throw std::runtime_error("no kernel of this format");  // the baseline has all of them
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

int usable_threads() {
  // OpenMP's threads do not exist in a forked child. A parallel region there would wait for them for ever. torch's
  // operators, which ours call, have such regions too.
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    in_forked_child = true;
    omp_set_num_threads(1);
  });
  return registered != 0 || in_forked_child ? 1 : int(torch::stable::get_num_threads());
}

}  // namespace rnnfast
