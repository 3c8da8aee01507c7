// Attack steps in CUDA C++: the arithmetic of csrc/step_math.h, four elements (16 bytes of fp32) per thread where the
// row length and the pointers allow it. The l2 step reads twice: partial sums per block, then the update; sums are
// combined in a fixed order, so results do not vary from run to run. Built with -fmad=false.
#include "../step_math.h"
#include "device.cuh"
#include "launch.h"

namespace rvlm::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T item[kVec];
};

template <typename T, typename G, int kVec, bool kQuantize>
__global__ void linf_kernel(StepArgs<T> a) {
  using Pixels = Pack<T, kVec>;
  using Slopes = Pack<G, kVec>;
  const Box<T> box{a.lo, a.hi, a.levels};
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const bool moves = a.active == nullptr || a.active[row];
    if (!moves && a.out == a.x_adv) continue;
    const T alpha = a.alpha[row * a.alpha_stride], eps = a.eps[row * a.eps_stride];
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < a.n;
         i += int64_t(gridDim.x) * blockDim.x * kVec) {
      const int64_t at = row * a.n + i;
      Pixels y = *reinterpret_cast<const Pixels*>(a.x_adv + at);
      if (moves) {
        const Pixels x = *reinterpret_cast<const Pixels*>(a.x + at);
        const Slopes g = *reinterpret_cast<const Slopes*>(static_cast<const G*>(a.grad) + at);
#pragma unroll
        for (int k = 0; k < kVec; ++k)
          y.item[k] = linf_pixel<T, kQuantize>(y.item[k], widen<T>(g.item[k]), x.item[k], alpha, eps, box);
      }
      *reinterpret_cast<Pixels*>(a.out + at) = y;
    }
  }
}

template <typename T, typename G>
__global__ void l2_sums_kernel(StepArgs<T> a, double* partial) {
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    if (a.active != nullptr && !a.active[row]) continue;
    double sum[3] = {0, 0, 0};
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n; i += int64_t(gridDim.x) * blockDim.x) {
      const int64_t at = row * a.n + i;
      const double g = widen<T>(static_cast<const G*>(a.grad)[at]), d = a.x_adv[at] - a.x[at];
      sum[0] += g * g, sum[1] += d * g, sum[2] += d * d;
    }
    block_sum(sum);
    if (threadIdx.x == 0)
      for (int k = 0; k < 3; ++k) partial[(row * gridDim.x + blockIdx.x) * 3 + k] = sum[k];
  }
}

template <typename T, typename G, bool kQuantize>
__global__ void l2_apply_kernel(StepArgs<T> a, const double* partial) {
  __shared__ T factors[2];
  const Box<T> box{a.lo, a.hi, a.levels};
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const bool moves = a.active == nullptr || a.active[row];
    if (!moves && a.out == a.x_adv) continue;
    if (moves && threadIdx.x == 0) {
      double sum[3] = {0, 0, 0};
      for (int block = 0; block < gridDim.x; ++block)
        for (int k = 0; k < 3; ++k) sum[k] += partial[(row * gridDim.x + block) * 3 + k];
      l2_factors(sum[0], sum[1], sum[2], a.alpha[row * a.alpha_stride], a.eps[row * a.eps_stride], factors[0], factors[1]);
    }
    __syncthreads();
    const T scale = factors[0], shrink = factors[1];
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < a.n; i += int64_t(gridDim.x) * blockDim.x) {
      const int64_t at = row * a.n + i;
      a.out[at] = moves ? l2_pixel<T, kQuantize>(a.x_adv[at], widen<T>(static_cast<const G*>(a.grad)[at]), a.x[at], scale,
                                                 shrink, box)
                        : a.x_adv[at];
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void start_kernel(T* out, const T* x, const T* eps, int eps_stride, const int64_t* ids, uint64_t seed,
                             uint32_t counter_stream, T lo, T hi, int64_t rows, int64_t n) {
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const uint64_t id = ids[row];
    const T radius = eps[row * eps_stride];
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < n; i += int64_t(gridDim.x) * blockDim.x * 4) {
      const Philox random(uint32_t(i / 4), uint32_t(id), uint32_t(id >> 32), counter_stream, seed);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (i + k < n) out[row * n + i + k] = start_pixel(random.word[k], x[row * n + i + k], radius, lo, hi);
    }
  }
}

dim3 grid_of(int64_t rows, int64_t n, int per_thread, int64_t most_blocks) {
  const int64_t blocks = (n + int64_t(kThreads) * per_thread - 1) / (int64_t(kThreads) * per_thread);
  return dim3(unsigned(blocks < most_blocks ? blocks : most_blocks), unsigned(rows < kMaxGridY ? rows : kMaxGridY));
}

template <typename T, typename G, int kVec>
void launch_linf(const StepArgs<T>& a, cudaStream_t stream) {
  const dim3 grid = grid_of(a.rows, a.n, kVec, 1 << 20);
  if (a.levels != T(0)) linf_kernel<T, G, kVec, true><<<grid, kThreads, 0, stream>>>(a);
  else linf_kernel<T, G, kVec, false><<<grid, kThreads, 0, stream>>>(a);
}

template <typename T, typename G>
void launch_l2(const StepArgs<T>& a, double* workspace, cudaStream_t stream) {
  const dim3 grid = grid_of(a.rows, a.n, 4, kL2Blocks);
  l2_sums_kernel<T, G><<<grid, kThreads, 0, stream>>>(a, workspace);
  if (a.levels != T(0)) l2_apply_kernel<T, G, true><<<grid, kThreads, 0, stream>>>(a, workspace);
  else l2_apply_kernel<T, G, false><<<grid, kThreads, 0, stream>>>(a, workspace);
}

template <typename T, typename G>
bool aligned(const StepArgs<T>& a) {
  const auto on = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  return a.n % 4 == 0 && on(a.out, 4 * sizeof(T)) && on(a.x_adv, 4 * sizeof(T)) && on(a.x, 4 * sizeof(T)) &&
         on(a.grad, 4 * sizeof(G));
}

// Calls f with a value of the gradient's type.
template <typename T, class F>
void with_grad_type(const StepArgs<T>& a, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else {
    if (a.grad_type == DataType::kBFloat16) f(__nv_bfloat16{});
    else if (a.grad_type == DataType::kFloat16) f(__half{});
    else f(float{});
  }
}

}  // namespace

template <typename T>
int linf_step(const StepArgs<T>& a, void* stream) {
  if (a.rows == 0 || a.n == 0) return 0;
  with_grad_type(a, [&](auto g) {
    using G = decltype(g);
    const auto s = static_cast<cudaStream_t>(stream);
    aligned<T, G>(a) ? launch_linf<T, G, 4>(a, s) : launch_linf<T, G, 1>(a, s);
  });
  return cudaGetLastError();
}

template <typename T>
int l2_step(const StepArgs<T>& a, double* workspace, void* stream) {
  if (a.rows == 0 || a.n == 0) return 0;
  with_grad_type(a, [&](auto g) { launch_l2<T, decltype(g)>(a, workspace, static_cast<cudaStream_t>(stream)); });
  return cudaGetLastError();
}

template <typename T>
int uniform_start(T* out, const T* x, const T* eps, int eps_stride, const int64_t* ids, uint64_t seed,
                  uint32_t counter_stream, T lo, T hi, int64_t rows, int64_t n, void* stream) {
  if (rows == 0 || n == 0) return 0;
  start_kernel<<<grid_of(rows, n, 4, 1 << 20), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      out, x, eps, eps_stride, ids, seed, counter_stream, lo, hi, rows, n);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

template int linf_step<float>(const StepArgs<float>&, void*);
template int linf_step<double>(const StepArgs<double>&, void*);
template int l2_step<float>(const StepArgs<float>&, double*, void*);
template int l2_step<double>(const StepArgs<double>&, double*, void*);
template int uniform_start<float>(float*, const float*, const float*, int, const int64_t*, uint64_t, uint32_t, float, float,
                                  int64_t, int64_t, void*);
template int uniform_start<double>(double*, const double*, const double*, int, const int64_t*, uint64_t, uint32_t, double,
                                   double, int64_t, int64_t, void*);

}  // namespace rvlm::cuda
