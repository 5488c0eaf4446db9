// Which kernel runs a layer: a pure function of sizes, the way of multiplying and the device's limits, so that it can be tested on
// any machine (tests/test_cuda_plan.py). Nothing here calls CUDA.
//
// Four tiers, fastest first. In the first three W_hh stays on chip for the whole sequence, in registers: 8 warps of 128
// words per lane hold 128 KiB per CTA (more spills, see notes on registers in csrc/README.md).
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

constexpr bool is_half(Product product) { return product == Product::kBfloat16 || product == Product::kHalf; }
constexpr int element_size(Product product) { return is_half(product) ? 2 : 4; }

struct DeviceLimits {
  int capability;       // 10 * major + minor
  int multiprocessors;  // SMs
  int shared_per_block; // bytes that one CTA may have when it asks for them
  int largest_cluster;  // CTAs; 1: none. Above 8 the size is "non-portable" and must be asked for
  bool cooperative;     // co-resident launches of the whole grid
};

struct Problem {
  Cell cell;
  Product product;
  bool backward;
  bool projected;
  int64_t hidden_size, output_size;  // output_size: proj_size if projected
  int64_t batch, directions;
};

struct Plan {
  Tier tier;
  int ctas;         // that hold one copy of W_hh
  int tile_units;   // units per CTA
  int tile_batch;   // rows of the batch per CTA
  int shared_bytes; // dynamic shared memory per CTA
};

constexpr int64_t kRegisterBytes = 128 * 1024;  // of weights per CTA in the resident tiers
constexpr int kTileBatch = 8;                   // columns of one mma: the batch tile of the resident tiers
constexpr int kUnitMultiple = 32;               // the resident tiers pad H to whole K slabs of 32

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
  if (problem.projected) return "a projection needs a second product per step, which only tier step has";
  if (device.capability < 80) return "asynchronous copies need compute capability 8.0 or newer";
  return nullptr;
}

inline const char* refuse_cta(const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_resident(problem, device)) return reason;
  return weight_bytes(problem) <= kRegisterBytes ? nullptr : "weight_hh exceeds the 128 KiB of registers of one CTA";
}

inline const char* refuse_cluster(const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_resident(problem, device)) return reason;
  if (device.largest_cluster < 2) return "clusters need compute capability 9.0 or newer";
  const int ctas = spread(problem, device.largest_cluster);
  if (ctas == 1) return "weight_hh fits one CTA";
  return ctas <= device.largest_cluster ? nullptr : "weight_hh exceeds the registers of the largest cluster";
}

inline const char* refuse_group(const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_resident(problem, device)) return reason;
  if (!device.cooperative) return "the device has no cooperative launch";
  const int ctas = spread(problem, device.multiprocessors);
  if (ctas == 1) return "weight_hh fits one CTA";
  const int64_t groups = device.multiprocessors / ctas;
  if (groups < problem.directions) return "weight_hh of all directions exceeds the registers of the device";
  // Each group takes up to 4 tiles of the batch one after another in a step; with more the per-step product of tier
  // step, which reads W_hh once for 64 rows, is no slower (estimate: gpu-peers' model, to be measured).
  const int64_t tiles = divide_up(problem.batch, kTileBatch) * problem.directions;
  return tiles <= 4 * groups ? nullptr : "the batch is too large for the groups that fit the device";
}

inline const char* refuse(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (const char* reason = refuse_any(problem, device)) return reason;
  switch (tier) {
    case Tier::kCta: return refuse_cta(problem, device);
    case Tier::kCluster: return refuse_cluster(problem, device);
    case Tier::kGroup: return refuse_group(problem, device);
    case Tier::kStep: return nullptr;
  }
  return "unknown tier";
}

// ---- tiles

// Tier step has two tiles. The large one reads W_hh once for 64 rows; the small one has 4 to 8 times the CTAs and splits
// K over its warps, and is taken until the large one can fill half of the device (estimate, to be measured).
struct TileSize {
  int units, batch;
};
constexpr TileSize kStepSmall{16, 16}, kStepLarge{32, 64};

inline bool step_large(const Problem& problem, const DeviceLimits& device) {
  const int64_t ctas = divide_up(problem.hidden_size, kStepLarge.units) * divide_up(problem.batch, kStepLarge.batch);
  return problem.batch > kStepSmall.batch && ctas * problem.directions * 2 >= device.multiprocessors;
}

// Of a tier that does not refuse. `step_shared_bytes`: what tier step's kernels declare for the tile (they know their
// stages); the resident tiers keep two buffers of h and a ring of 4 steps of gates_x.
inline Plan tile(Tier tier, const Problem& problem, const DeviceLimits& device) {
  if (tier == Tier::kStep) {
    const TileSize chosen = step_large(problem, device) ? kStepLarge : kStepSmall;
    return {tier, 1, chosen.units, chosen.batch, 0};
  }
  const int ctas = tier == Tier::kCta ? 1 : spread(problem, device.multiprocessors);
  const int padded = int(round_up(problem.hidden_size, kUnitMultiple)), units = padded / ctas;
  const int size = element_size(problem.product);
  const int state = problem.backward ? grad_planes(problem.cell) : 1;  // planes exchanged per unit
  const int gates = problem.backward ? saved_planes(problem.cell) + 2 : gate_count(problem.cell);
  return {tier, ctas, units, kTileBatch, kTileBatch * size * (2 * state * padded + 4 * gates * units)};
}

// The fastest compiled tier that can run the problem (`compiled`: one bit per tier), or `forced` and no other (its name;
// null or empty: none). Where none can, the reason is in `refusal`.
inline bool choose(const Problem& problem, const DeviceLimits& device, unsigned compiled, const char* forced, Plan& plan,
                   std::string& refusal) {
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
