// The resources of the resident tiers' kernels, in the form that plan.h reads. resident.cu includes this, and so does
// the test of plan.h, which compiles no kernel.
#pragma once

#include "cuda/plan/plan.h"
#include "cuda/tiers/cluster/cluster.h"
#include "cuda/tiers/cta/cta.h"
#include "cuda/tiers/group/group.h"

namespace rnnfast::cuda {

// Asks the device nothing. Only exchange_bytes depends on the shape's steps and batch.
template <Arithmetic arithmetic>
Resources resident_resources(Tier tier, const Shape& shape, bool backward) {
  const auto refused = [](const char* refusal) { return Resources{refusal, 0, 0, 0, 0}; };
  if (tier == Tier::kCta) {
    if (const char* refusal = cta_refuses(arithmetic, shape)) return refused(refusal);
    const CtaResources found =
        backward ? cta_backward_resources<arithmetic>(shape) : cta_forward_resources<arithmetic>(shape);
    return {nullptr, 1, found.threads, found.shared_bytes, 0};
  }
  if (tier == Tier::kCluster) {
    if (const char* refusal = cluster_refuses(arithmetic, shape)) return refused(refusal);
    const ClusterResources found =
        backward ? cluster_backward_resources<arithmetic>(shape) : cluster_forward_resources<arithmetic>(shape);
    return {nullptr, found.ctas, found.threads, found.shared_bytes, 0};
  }
  if (const char* refusal = group_refuses(arithmetic, shape)) return refused(refusal);
  const GroupResources found =
      backward ? group_backward_resources<arithmetic>(shape) : group_forward_resources<arithmetic>(shape);
  return {nullptr, found.members, found.threads, found.shared_bytes, found.exchange_bytes};
}

}  // namespace rnnfast::cuda
