// Chooses the instruction set once per process, and the number of threads at every call.
#include <omp.h>
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/layer.h"

namespace rnnfast {

namespace base {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kKernels;
}
#endif

namespace {

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

std::atomic<bool> in_forked_child{false};

}  // namespace

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
