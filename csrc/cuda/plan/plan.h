// Chooses the kernel that runs a layer. The choice follows from the layer's sizes, the arithmetic, the device's limits
// and the resources of the kernels. Nothing here calls CUDA, so every machine can test it
// (tests/cuda/test_cuda_plan.py).
//
// There are four tiers. The first that can run a layer is preferred:
//   cta      one CTA per batch tile and direction holds all of W_hh
//   cluster  2 to 16 CTAs hold a slice of units each; they exchange h through distributed shared memory
//   group    co-resident CTAs of the whole device hold a slice each; they exchange h through global memory
//   step     one launch per time step reads W_hh from L2; it takes any size and any device
// The tiers cta, cluster and group are resident: W_hh stays on the chip for the whole sequence. It is in registers; the
// part that exceeds them is in shared memory. Their batch tile has 8 sequences.
//
// A kernel's resources depend on its templates. resident.cuh asks the tiers for them.
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
  int shared_per_block;  // the most bytes of shared memory that one CTA can ask for
  int largest_cluster;   // CTAs; 1: no clusters. More than 8 are "non-portable": a kernel must allow them
  bool cooperative;      // the device can run a whole grid at once
};

// What a plan is for.
struct Problem {
  Arithmetic arithmetic;
  bool backward;
  bool projected;  // not read from the shape: a user can ask for a projection that is not smaller than hidden_size
  Shape shape;     // without rows: offsets and lengths are null
};

// The resources of the kernel with which a resident tier would run a problem.
struct Resources {
  const char* refusal;  // why there is no such kernel; null: there is one, and the other fields are valid
  int ctas;             // CTAs that hold one copy of W_hh together. They wait for each other, so all must run at once
  int threads;          // per CTA
  int shared_bytes;     // dynamic shared memory per CTA
  int64_t exchange_bytes;  // workspace per call
};

struct Plan {
  Tier tier;
  bool large;        // tier step: its large tile, not its small one
  int ctas;          // CTAs that hold one copy of W_hh together
  int tile_units;    // units per CTA; in a resident tier without padding
  int tile_batch;    // sequences per CTA
  int shared_bytes;  // dynamic shared memory per CTA
};

constexpr int kTileBatch = 8;  // columns of one mma: the batch tile of the resident tiers

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ---- why a tier cannot run a problem; null: it can

// Reasons that hold for every tier.
inline const char* refuse_any(const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 75) return "it needs compute capability 7.5 or newer";
  if (problem.arithmetic == Arithmetic::kBfloat16 && device.capability < 80)
    return "bfloat16 products need compute capability 8.0 or newer";
  if (problem.arithmetic == Arithmetic::kTf32 && device.capability < 80)
    return "TF32 products need compute capability 8.0 or newer";
  return nullptr;
}

// Reasons that hold for every kernel of a resident tier.
inline const char* refuse_resident(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 80) return "asynchronous copies need compute capability 8.0 or newer";
  if (tier == Tier::kCluster && device.largest_cluster < 2) return "clusters need compute capability 9.0 or newer";
  if (tier == Tier::kGroup && !device.cooperative) return "the device has no cooperative launch";
  if (problem.projected && problem.shape.output_size >= problem.shape.hidden_size)
    return "a projection must be smaller than hidden_size";
  return nullptr;
}

// Reasons of one kernel.
inline const char* refuse_kernel(Tier tier, const Resources& kernel, const DeviceLimits& device) {
  if (kernel.refusal) return kernel.refusal;
  if (tier == Tier::kCluster && kernel.ctas > device.largest_cluster) return "the device has no clusters of that size";
  return kernel.shared_bytes <= device.shared_per_block ? nullptr : "it needs more shared memory than a CTA has";
}

// ---- which tier is preferred

// The most waves with which a resident tier is still preferred to tier step. A wave is the batch tiles that run at
// once.
//
// A time step costs a resident tier waves * 0.5 us (cta), 1 us (cluster) or 2 us (group). It costs tier step 2.5 us and
// the products, which read W_hh once for 64 rows. So tier step wins where waves are many. It never wins against tier
// cta: all CTAs of that tier are busy, and they use the tensor cores as well. Exact float32 products of tier step are
// plain FFMA, several times slower than the three TF32 products of the other tiers. So there the limit is 4 times as
// high.
//
// These times are estimates (docs/design/cuda.md, Waves).
constexpr int64_t most_waves(Tier tier, Arithmetic arithmetic) {
  const int64_t most = tier == Tier::kCluster ? 8 : tier == Tier::kGroup ? 2 : INT32_MAX;
  return arithmetic == Arithmetic::kExact ? 4 * most : most;
}

// Assumes one CTA per SM.
inline int64_t waves(const Problem& problem, const Resources& kernel, const DeviceLimits& device) {
  const int64_t at_once = device.multiprocessors / kernel.ctas;
  return divide_up(divide_up(problem.shape.batch, kTileBatch) * problem.shape.directions, at_once > 1 ? at_once : 1);
}

// ---- tiles

// Tier step has two tiles. The large one reads W_hh once for 64 rows. The small one makes 4 to 8 times as many CTAs and
// splits K over its warps. A plan takes the large one where that fills half of the device (an estimate).
struct StepTileSize {
  int units, batch;
  int split;  // into so many parts K is cut, one per warp; 1: not at all
  int slabs;  // pieces of 64 bytes of K in a stage; where K is split, one per warp
};
constexpr int kStepWarps = 4, kStepStages = 3, kSlabBytes = 64;

// With one plane (backward, projection) a unit has fewer rows of weights, so the large tile has more units.
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
  const char* passed[kTiers];  // why a tier was passed over; null: it is the plan's, or it was not considered
  const char* unknown;         // the name that was forced, if no tier has it; else null

  std::string why() const {
    if (unknown) return std::string("RNNFAST_TIER: expected cta, cluster, group or step, got ") + unknown;
    std::string text;
    for (int i = 0; i < kTiers; ++i)
      if (passed[i]) text += std::string(text.empty() ? "" : "; ") + "tier " + kTierNames[i] + ": " + passed[i];
    return text;
  }
};

// Takes the first tier that can run the problem and has few enough waves. `forced` names the only tier that may be
// taken, whatever its waves; null or empty: any. `kernels` answers two questions about resident tiers, and only when it
// must:
//   Resources resources(Tier) const     the resources of its kernel
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
