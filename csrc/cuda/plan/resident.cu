// Runs the resident tiers for the host, and casts void pointers to pointers to the element type. Host code only.
#include <bit>

#include "cuda/plan/resident.cuh"
#include "cuda/plan/tiers.h"

namespace rnnfast::cuda {

template <Arithmetic kArithmetic>
cudaError_t resident_fits(Tier tier, const Shape& shape, bool backward, bool* fits) {
  *fits = true;  // the CTAs of tier cta wait for nobody
  if (tier == Tier::kCluster)
    return backward ? cluster_backward_fits<kArithmetic>(shape, fits) : cluster_forward_fits<kArithmetic>(shape, fits);
  if (tier == Tier::kGroup)
    return backward ? group_backward_fits<kArithmetic>(shape, fits) : group_forward_fits<kArithmetic>(shape, fits);
  return cudaSuccess;
}

template <Arithmetic kArithmetic>
cudaError_t run_resident_forward(Tier tier, const ForwardLayer<void>& call, void* exchange, cudaStream_t stream) {
  const auto layer = std::bit_cast<ForwardLayer<ElementOf<kArithmetic>>>(call);
  if (tier == Tier::kCta) return launch_cta_forward<kArithmetic>(layer, stream);
  if (tier == Tier::kCluster) return launch_cluster_forward<kArithmetic>(layer, stream);
  return launch_group_forward<kArithmetic>(layer, exchange, stream);
}

template <Arithmetic kArithmetic>
cudaError_t run_resident_backward(Tier tier, const BackwardLayer<void>& call, void* exchange, cudaStream_t stream) {
  const auto layer = std::bit_cast<BackwardLayer<ElementOf<kArithmetic>>>(call);
  if (tier == Tier::kCta) return launch_cta_backward<kArithmetic>(layer, stream);
  if (tier == Tier::kCluster) return launch_cluster_backward<kArithmetic>(layer, stream);
  return launch_group_backward<kArithmetic>(layer, exchange, stream);
}

#define RNNFAST_INSTANTIATE(arithmetic)                                                                       \
  template Resources resident_resources<Arithmetic::arithmetic>(Tier, const Shape&, bool);                    \
  template cudaError_t resident_fits<Arithmetic::arithmetic>(Tier, const Shape&, bool, bool*);                \
  template cudaError_t run_resident_forward<Arithmetic::arithmetic>(Tier, const ForwardLayer<void>&, void*,   \
                                                                    cudaStream_t);                            \
  template cudaError_t run_resident_backward<Arithmetic::arithmetic>(Tier, const BackwardLayer<void>&, void*, \
                                                                     cudaStream_t);
RNNFAST_INSTANTIATE(kBfloat16)
RNNFAST_INSTANTIATE(kHalf)
RNNFAST_INSTANTIATE(kTf32)
RNNFAST_INSTANTIATE(kExact)

}  // namespace rnnfast::cuda
