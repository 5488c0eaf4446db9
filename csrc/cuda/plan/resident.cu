// The resident tiers for the host: void pointers become those of the element type. Host code only.
#include <bit>

#include "cuda/plan/resident.cuh"
#include "cuda/plan/tiers.h"

namespace rnnfast::cuda {

template <Product kProduct>
cudaError_t resident_fits(Tier tier, const Shape& shape, bool backward, bool* fits) {
  *fits = true;  // the CTAs of tier cta wait for nobody
  if (tier == Tier::kCluster)
    return backward ? cluster_backward_fits<kProduct>(shape, fits) : cluster_forward_fits<kProduct>(shape, fits);
  if (tier == Tier::kGroup)
    return backward ? group_backward_fits<kProduct>(shape, fits) : group_forward_fits<kProduct>(shape, fits);
  return cudaSuccess;
}

template <Product kProduct>
cudaError_t run_resident_forward(Tier tier, const ForwardLayer<void>& call, void* exchange, cudaStream_t stream) {
  const auto layer = std::bit_cast<ForwardLayer<ElementOf<kProduct>>>(call);
  if (tier == Tier::kCta) return launch_cta_forward<kProduct>(layer, stream);
  if (tier == Tier::kCluster) return launch_cluster_forward<kProduct>(layer, stream);
  return launch_group_forward<kProduct>(layer, exchange, stream);
}

template <Product kProduct>
cudaError_t run_resident_backward(Tier tier, const BackwardLayer<void>& call, void* exchange, cudaStream_t stream) {
  const auto layer = std::bit_cast<BackwardLayer<ElementOf<kProduct>>>(call);
  if (tier == Tier::kCta) return launch_cta_backward<kProduct>(layer, stream);
  if (tier == Tier::kCluster) return launch_cluster_backward<kProduct>(layer, stream);
  return launch_group_backward<kProduct>(layer, exchange, stream);
}

#define RNNFAST_INSTANTIATE(product)                                                                                 \
  template Resources resident_resources<Product::product>(Tier, const Shape&, bool);                                 \
  template cudaError_t resident_fits<Product::product>(Tier, const Shape&, bool, bool*);                             \
  template cudaError_t run_resident_forward<Product::product>(Tier, const ForwardLayer<void>&, void*, cudaStream_t); \
  template cudaError_t run_resident_backward<Product::product>(Tier, const BackwardLayer<void>&, void*, cudaStream_t);
RNNFAST_INSTANTIATE(kBfloat16)
RNNFAST_INSTANTIATE(kHalf)
RNNFAST_INSTANTIATE(kTf32)
RNNFAST_INSTANTIATE(kExact)

}  // namespace rnnfast::cuda
