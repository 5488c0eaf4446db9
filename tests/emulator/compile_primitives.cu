// For nvcc only: every primitive, compiled for the architectures that rnnfast is built for. Nothing here runs.
#include "misuse_kernels.cuh"
#include "planted.cuh"
#include "primitive_kernels.cuh"

namespace rnnfast::cuda::test {

template __global__ void mma_kernel<__nv_bfloat16>(const float*, const float*, float*);
template __global__ void mma_kernel<__half>(const float*, const float*, float*);
template __global__ void mma_kernel<float>(const float*, const float*, float*);
template __global__ void copy_kernel<4, 2>(const unsigned char*, unsigned char*);
template __global__ void copy_kernel<8, 1>(const unsigned char*, unsigned char*);
template __global__ void copy_kernel<16, 0>(const unsigned char*, unsigned char*);
template __global__ void block_loop<Bug::kNone>(const float*, float*, int);
template __global__ void cluster_loop<Bug::kNone>(const float*, float*, int, int);
template __global__ void group_loop<Bug::kNone>(const float*, float*, float*, uint32_t*, int);

__global__ void load_kernel(const uint2* two, const float4* four, float* out) {
  *out = __uint_as_float(load_uncached(two).y) + load_uncached(four).w;
}

#if defined(NEEDS_SM_90)  // must fail to build where this is missing
__global__ void needs_sm_90(unsigned* rank) { *rank = cluster_rank(); }
#endif

cudaError_t launch_poll(cudaStream_t stream, uint4* mail, int* gave_up) {
  unsigned blocks = 0;
  const cudaError_t error = resident_blocks(poll_kernel, dim3(32), 16, 64 << 10, &blocks);
  return error ? error : launch(poll_kernel, dim3(blocks), dim3(32), 16, true, 64 << 10, stream, mail, gave_up);
}

}  // namespace rnnfast::cuda::test
