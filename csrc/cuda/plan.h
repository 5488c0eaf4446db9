// Which kernel runs a layer: a pure function of sizes, the way of multiplying and the device's limits, so that it can
// be tested on any machine (tests/test_cuda_plan.py). Nothing here calls CUDA.
//
// Four tiers, fastest first. In the first three W_hh stays on chip for the whole sequence, in registers: 8 warps of 128
// words per lane hold 128 KiB per CTA and more spills.
//   cta      one CTA per batch tile and direction holds all of W_hh
//   cluster  2, 4, 8 or 16 CTAs, each a slice of units; they exchange h through distributed shared memory
//   group    co-resident CTAs on the whole device; they exchange h through global memory, so they wait for each other
//   step     one launch per time step, W_hh read from L2 every time: any size, any device
#pragma once

#include <cstdint>
#include <string>

#include "layer.h"

namespace rnnfast::cuda {

enum class Tier { kCta, kCluster, kGroup, kStep };
constexpr int kTiers = 4;
constexpr const char* kTierNames[kTiers] = {"cta", "cluster", "group", "step"};

constexpr int element_size(Product product) { return is_16_bit(product) ? 2 : 4; }

struct DeviceLimits {
  int capability;        // 10 * major + minor
  int multiprocessors;   // SMs
  int shared_per_block;  // bytes that one CTA may have when it asks for them
  int largest_cluster;   // CTAs; 1: none. Above 8 the size is "non-portable" and must be asked for
  bool cooperative;      // co-resident launches of the whole grid
};

struct Problem {
  Cell cell;
  Product product;
  bool backward;
  bool projected;
  int64_t hidden_size, output_size;  // output_size: proj_size if projected
  int64_t batch, directions;
  int cta_shared_bytes;  // of the kernel of tier CTA that would run it, where that exists
};

struct Plan {
  Tier tier;
  bool large;        // of tier step's two tiles
  int ctas;          // that hold one copy of W_hh
  int tile_units;    // units per CTA
  int tile_batch;    // rows of the batch per CTA
  int shared_bytes;  // dynamic shared memory per CTA
};

constexpr int64_t kRegisterBytes = 128 * 1024;  // of weights per CTA in the resident tiers
constexpr int kTileBatch = 8;                   // columns of one mma: the batch tile of the resident tiers
constexpr int kUnitMultiple = 32;               // what the resident tiers pad H to

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Of W_hh as the resident tiers keep it.
inline int64_t weight_bytes(const Problem& problem) {
  const int64_t padded = round_up(problem.hidden_size, kUnitMultiple);
  return gate_count(problem.cell) * padded * padded * element_size(problem.product);
}

// CTAs that one copy of W_hh is spread over, a power of two; slices are whole multiples of 8 units.
inline int spread(const Problem& problem, int most) {
  int ctas = 1;
  while (ctas <= most && weight_bytes(problem) > ctas * kRegisterBytes) ctas *= 2;
  return ctas;
}

// Dynamic shared memory of a CTA that exchanges h: two buffers of all units' h (backward: gate gradients) and a ring of
// 4 steps of its own units' gates_x (backward: saved gates, c and grad_output).
inline int64_t exchange_shared_bytes(const Problem& problem, int ctas) {
  const int64_t padded = round_up(problem.hidden_size, kUnitMultiple);
  const int64_t state = problem.backward ? grad_planes(problem.cell) : 1;
  const int64_t stream = problem.backward ? saved_planes(problem.cell) + 2 : gate_count(problem.cell);
  return kTileBatch * element_size(problem.product) * (2 * state * padded + 4 * stream * (padded / ctas));
}

// ---- why a tier cannot run a problem; null: it can

// What no tier can do.
inline const char* refuse_any(const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 75) return "it needs compute capability 7.5 or newer";
  if (problem.product == Product::kBfloat16 && device.capability < 80)
    return "bfloat16 products need compute capability 8.0 or newer";
  if (problem.product == Product::kTf32 && device.capability < 80)
    return "TF32 products need compute capability 8.0 or newer";
  return nullptr;
}

inline const char* refuse_resident(const Problem& problem, const DeviceLimits& device) {
  if (device.capability < 80) return "asynchronous copies need compute capability 8.0 or newer";
  if (problem.projected && problem.output_size >= problem.hidden_size)
    return "a projection must be smaller than hidden_size";
  return nullptr;
}

inline const char* refuse_cta(const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_resident(problem, device)) return reason;
  if (problem.hidden_size > cta_largest_hidden(problem.product, problem.cell))
    return "weight_hh exceeds the registers of one CTA";
  return problem.cta_shared_bytes <= device.shared_per_block ? nullptr : "it needs more shared memory than a CTA has";
}

// Of the tiers in which CTAs exchange h.
inline const char* refuse_exchange(const Problem& problem, const DeviceLimits& device, int most) {
  if (const char* reason = refuse_resident(problem, device)) return reason;
  if (problem.projected) return "it has no second product for a projection";
  const int ctas = spread(problem, most);
  if (ctas == 1) return "weight_hh fits one CTA";
  if (ctas > most) return "weight_hh exceeds the registers of all CTAs";
  return exchange_shared_bytes(problem, ctas) <= device.shared_per_block ? nullptr
                                                                         : "h exceeds the shared memory of a CTA";
}

inline const char* refuse_cluster(const Problem& problem, const DeviceLimits& device) {
  if (device.largest_cluster < 2) return "clusters need compute capability 9.0 or newer";
  return refuse_exchange(problem, device, device.largest_cluster);
}

inline const char* refuse_group(const Problem& problem, const DeviceLimits& device) {
  if (!device.cooperative) return "the device has no cooperative launch";
  const int most = int(device.multiprocessors / problem.directions);
  if (const char* reason = refuse_exchange(problem, device, most)) return reason;
  // Each group takes up to 4 tiles of the batch one after another in a step; with more the per-step product of tier
  // step, which reads W_hh once for 64 rows, is no slower (estimate: gpu-peers' model, to be measured).
  const int64_t groups = device.multiprocessors / spread(problem, most);
  const int64_t tiles = divide_up(problem.batch, kTileBatch) * problem.directions;
  return tiles <= 4 * groups ? nullptr : "the batch is too large for the groups that fit the device";
}

inline const char* refuse(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_any(problem, device)) return reason;
  switch (tier) {
    case Tier::kCta:
      return refuse_cta(problem, device);
    case Tier::kCluster:
      return refuse_cluster(problem, device);
    case Tier::kGroup:
      return refuse_group(problem, device);
    case Tier::kStep:
      return nullptr;
  }
  return "unknown tier";
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
  const int64_t ctas =
      divide_up(problem.hidden_size, large.units) * divide_up(problem.batch, large.batch) * problem.directions;
  return problem.batch > step_tile(planes, false).batch && 2 * ctas >= device.multiprocessors &&
         step_shared_bytes(planes, true) <= device.shared_per_block;
}

// Of a tier that does not refuse.
inline Plan tile(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (tier == Tier::kStep) {
    const int planes = problem.backward ? 1 : gate_count(problem.cell);
    const bool large = step_large(problem, planes, device);
    const StepTileSize size = step_tile(planes, large);
    return {tier, large, 1, size.units, size.batch, step_shared_bytes(planes, large)};
  }
  const int padded = int(round_up(problem.hidden_size, kUnitMultiple));
  if (tier == Tier::kCta) return {tier, false, 1, padded, kTileBatch, problem.cta_shared_bytes};
  const int most = tier == Tier::kCluster ? device.largest_cluster : int(device.multiprocessors / problem.directions);
  const int ctas = spread(problem, most);
  return {tier, false, ctas, padded / ctas, kTileBatch, int(exchange_shared_bytes(problem, ctas))};
}

// The fastest compiled tier that can run the problem (`compiled`: one bit per tier), or `forced` and no other (its
// name; null or empty: none). Where none can, the reason is in `refusal`.
inline bool choose(const Problem& problem, const DeviceLimits& device, unsigned compiled, const char* forced,
                   Plan& plan, std::string& refusal) {
  const std::string wanted = forced ? forced : "";
  bool known = wanted.empty();
  for (int i = 0; i < kTiers; ++i) {
    if (!wanted.empty() && wanted != kTierNames[i]) continue;
    known = true;
    const char* reason = compiled >> i & 1 ? refuse(Tier(i), problem, device) : "it is not compiled in";
    if (!reason) {
      plan = tile(Tier(i), problem, device);
      return true;
    }
    refusal = std::string("tier ") + kTierNames[i] + ": " + reason;
  }
  if (!known) refusal = "RNNFAST_TIER: expected cta, cluster, group or step, got " + wanted;
  return false;
}

}  // namespace rnnfast::cuda
