// Which kernel runs a layer: a pure function of sizes, the way of multiplying, the device's limits and what the kernels
// say of themselves, so that it can be tested on any machine (tests/test_cuda_plan.py). Nothing here calls CUDA.
//
// Four tiers, in the order in which they are preferred. In the first three, the resident ones, W_hh stays on chip for
// the whole sequence, in registers (what exceeds them in shared memory), and a batch tile has 8 sequences.
//   cta      one CTA per batch tile and direction holds all of W_hh
//   cluster  2 to 16 CTAs, each with a slice of units; they exchange h through distributed shared memory
//   group    co-resident CTAs of the whole device; they exchange h through global memory
//   step     one launch per time step, W_hh read from L2 every time: any size, any device
// What a kernel takes depends on its templates, so the tiers tell it (resident.cuh): Resources.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/layer.h"

namespace rnnfast::cuda {

enum class Tier { kCta, kCluster, kGroup, kStep };
constexpr int kTiers = 4;
constexpr const char* kTierNames[kTiers] = {"cta", "cluster", "group", "step"};

constexpr int element_size(Arithmetic arithmetic) { return is_16_bit(arithmetic) ? 2 : 4; }

struct DeviceLimits {
  int capability;        // 10 * major + minor
  int multiprocessors;   // SMs
  int shared_per_block;  // bytes that one CTA may have when it asks for them
  int largest_cluster;   // CTAs; 1: none. Above 8 the size is "non-portable" and must be asked for
  bool cooperative;      // co-resident launches of the whole grid
};

struct Problem {
  Arithmetic arithmetic;
  bool backward;
  bool projected;
  Shape shape;
};

// What the kernel takes with which a resident tier would run a problem.
struct Resources {
  const char* refusal;     // why there is no such kernel; null: there is one, and the rest is known
  int ctas;                // that hold one copy of W_hh; they wait for each other, so all must run at once
  int threads;             // of a CTA
  int shared_bytes;        // dynamic, of a CTA
  int64_t exchange_bytes;  // of the workspace of a call
};

struct Plan {
  Tier tier;
  bool large;        // of tier step's two tiles
  int ctas;          // that hold one copy of W_hh
  int tile_units;    // units per CTA; of the resident tiers without what they pad
  int tile_batch;    // rows of the batch per CTA
  int shared_bytes;  // dynamic shared memory per CTA
};

constexpr int kTileBatch = 8;  // columns of one mma: the batch tile of the resident tiers

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ---- why a tier cannot run a problem; null: it can

// What no tier can do.
inline const char* refuse_any(const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 75) return "it needs compute capability 7.5 or newer";
  if (problem.arithmetic == Arithmetic::kBfloat16 && device.capability < 80)
    return "bfloat16 products need compute capability 8.0 or newer";
  if (problem.arithmetic == Arithmetic::kTf32 && device.capability < 80)
    return "TF32 products need compute capability 8.0 or newer";
  return nullptr;
}

// What a resident tier cannot do whatever its kernel.
inline const char* refuse_resident(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 80) return "asynchronous copies need compute capability 8.0 or newer";
  if (tier == Tier::kCluster && device.largest_cluster < 2) return "clusters need compute capability 9.0 or newer";
  if (tier == Tier::kGroup && !device.cooperative) return "the device has no cooperative launch";
  if (problem.projected && problem.shape.output_size >= problem.shape.hidden_size)
    return "a projection must be smaller than hidden_size";
  return nullptr;
}

// What the device lacks for a kernel.
inline const char* refuse_kernel(Tier tier, const Resources& kernel, const DeviceLimits& device) {
  if (kernel.refusal) return kernel.refusal;
  if (tier == Tier::kCluster && kernel.ctas > device.largest_cluster) return "the device has no clusters of that size";
  return kernel.shared_bytes <= device.shared_per_block ? nullptr : "it needs more shared memory than a CTA has";
}

// ---- which tier is preferred

// How many waves a resident tier may take and still be preferred: as many batch tiles as the device holds run at once,
// the others after them. All waves of a step together take waves * (0.5, 1 or 2 us, by tier), tier step 2.5 us plus its
// products, which read W_hh once for 64 rows: it wins where waves are many. Never against tier cta, whose CTAs are all
// busy and use the tensor cores no worse. Exact float32 products are plain FFMA there, several times slower than three
// of TF32, so the others may take 4 times as many waves. All this is an estimate: no GPU has measured it
// (docs/design/cuda.md, Waves).
constexpr int64_t most_waves(Tier tier, Arithmetic arithmetic) {
  const int64_t most = tier == Tier::kCluster ? 8 : tier == Tier::kGroup ? 2 : INT32_MAX;
  return arithmetic == Arithmetic::kExact ? 4 * most : most;
}

// Estimated with one CTA per SM.
inline int64_t waves(const Problem& problem, const Resources& kernel, const DeviceLimits& device) {
  const int64_t at_once = device.multiprocessors / kernel.ctas;
  return divide_up(divide_up(problem.shape.batch, kTileBatch) * problem.shape.directions, at_once > 1 ? at_once : 1);
}

// ---- tiles

// Tier step has two tiles. The large one reads W_hh once for 64 rows; the small one has 4 to 8 times the CTAs and
// splits K over its warps, and is taken until the large one can fill half of the device (estimate, to be measured).
struct StepTileSize {
  int units, batch;
  int split;  // parts of K, one per warp
  int slabs;  // of 64 bytes of K in a stage; where K is split, one for each warp
};
constexpr int kStepWarps = 4, kStepStages = 3, kSlabBytes = 64;

// One plane alone (backward, projection) has fewer rows of weight, so a large tile takes more units.
constexpr StepTileSize step_tile(int planes, bool large) {
  return large ? StepTileSize{planes == 1 ? 64 : 32, 64, 1, 2} : StepTileSize{16, 16, kStepWarps, kStepWarps};
}
constexpr int step_shared_bytes(int planes, bool large) {
  const StepTileSize tile = step_tile(planes, large);
  return kStepStages * tile.slabs * (planes * tile.units + tile.batch) * kSlabBytes;
}

inline bool step_large(const Problem& problem, int planes, const DeviceLimits& device) {
  const StepTileSize large = step_tile(planes, true);
  const Shape& shape = problem.shape;
  const int64_t ctas =
      divide_up(shape.hidden_size, large.units) * divide_up(shape.batch, large.batch) * shape.directions;
  return shape.batch > step_tile(planes, false).batch && 2 * ctas >= device.multiprocessors &&
         step_shared_bytes(planes, true) <= device.shared_per_block;
}

inline Plan step_plan(const Problem& problem, const DeviceLimits& device) {
  const int planes = problem.backward ? 1 : gate_count(problem.shape.cell);
  const bool large = step_large(problem, planes, device);
  const StepTileSize size = step_tile(planes, large);
  return {Tier::kStep, large, 1, size.units, size.batch, step_shared_bytes(planes, large)};
}

// ---- the choice

struct Choice {
  bool found;
  Plan plan;
  const char* passed[kTiers];  // why a tier was asked and not taken; null: it was not asked, or is the plan's
  const char* unknown;         // what was forced, where no tier has that name

  std::string why() const {
    if (unknown) return std::string("RNNFAST_TIER: expected cta, cluster, group or step, got ") + unknown;
    std::string text;
    for (int i = 0; i < kTiers; ++i)
      if (passed[i]) text += std::string(text.empty() ? "" : "; ") + "tier " + kTierNames[i] + ": " + passed[i];
    return text;
  }
};

// The first tier that can run the problem and is not too slow for its batch; or the one that `forced` names (null or
// empty: none), if it can. `kernels` is asked only for what matters:
//   Resources resources(Tier) const     of a resident tier's kernel
//   const char* unfit(Tier) const       why its CTAs cannot all run at once on this device; null: they can
template <class Kernels>
Choice choose(const Problem& problem, const DeviceLimits& device, const char* forced, const Kernels& kernels) {
  Choice choice{};
  const std::string_view wanted = forced ? forced : "";
  if (!wanted.empty()) choice.unknown = forced;
  for (int i = 0; i < kTiers && !choice.found; ++i) {
    const Tier tier = Tier(i);
    if (!wanted.empty() && wanted != kTierNames[i]) continue;
    choice.unknown = nullptr;
    const char*& reason = choice.passed[i];
    reason = refuse_any(problem, device);
    if (reason) continue;
    if (tier == Tier::kStep) {
      choice.plan = step_plan(problem, device);
    } else {
      reason = refuse_resident(tier, problem, device);
      if (reason) continue;
      const Resources kernel = kernels.resources(tier);
      reason = refuse_kernel(tier, kernel, device);
      if (!reason && wanted.empty() && waves(problem, kernel, device) > most_waves(tier, problem.arithmetic))
        reason = "so many rows take too many turns";
      if (!reason) reason = kernels.unfit(tier);
      if (reason) continue;
      const int units = int(divide_up(problem.shape.hidden_size, kernel.ctas));
      choice.plan = {tier, false, kernel.ctas, units, kTileBatch, kernel.shared_bytes};
    }
    choice.found = true;
  }
  return choice;
}

}  // namespace rnnfast::cuda
