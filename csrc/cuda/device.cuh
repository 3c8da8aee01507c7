// What the kernels share: the types that they read, and sums over a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace rvlm::cuda {

constexpr int kThreads = 256;

template <typename T> __device__ __forceinline__ T widen(float v) { return T(v); }
template <typename T> __device__ __forceinline__ T widen(double v) { return T(v); }
template <typename T> __device__ __forceinline__ T widen(__nv_bfloat16 v) { return T(__bfloat162float(v)); }
template <typename T> __device__ __forceinline__ T widen(__half v) { return T(__half2float(v)); }

template <typename S> struct Narrow {
  template <typename T> __device__ __forceinline__ static S from(T v) { return S(v); }
};
template <> struct Narrow<__nv_bfloat16> {
  __device__ __forceinline__ static __nv_bfloat16 from(float v) { return __float2bfloat16(v); }
};
template <> struct Narrow<__half> {
  __device__ __forceinline__ static __half from(float v) { return __float2half(v); }
};

// Sums over the block's kThreads threads; every thread gets the results. Twice in a row is safe.
template <int kSums, typename T>
__device__ void block_sum(T (&sum)[kSums]) {
  __shared__ T shared[kSums][kThreads / 32];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    for (int offset = 16; offset > 0; offset /= 2) sum[k] += __shfl_down_sync(0xffffffff, sum[k], offset);
    if (threadIdx.x % 32 == 0) shared[k][threadIdx.x / 32] = sum[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sum[k] = T(0);
    for (int warp = 0; warp < kThreads / 32; ++warp) sum[k] += shared[k][warp];
  }
  __syncthreads();
}

}  // namespace rvlm::cuda
