// Residual, anchor and LayerNorm in one pass in CUDA C++, forward and backward. Forward: a block per token of a sample.
// Backward: a block per token and part of the batch, which walks along the samples of its part and adds up in memory of
// its own; a second kernel adds the parts in a fixed order, so results do not vary from run to run.
// The specification is the eager reference in rvlm/ops/attention.py.
#include "device.cuh"
#include "launch.h"

namespace rvlm::cuda {
namespace {

template <typename T, typename S>
__global__ void forward_kernel(Stream<T> s, const S* x0, const S* o, const T* anchor, const T* mix, const T* bias, T eps,
                               S* x1, S* y, T* mean, T* rstd) {
  const T c_o = mix[0], c_a = mix[1];
  for (int64_t row = blockIdx.x; row < s.batch * s.n; row += gridDim.x) {
    const int64_t at = row * s.d;
    const T* a = anchor + row % s.n * s.d;
    const auto joint = [&](int64_t i) { return widen<T>(x0[at + i]) + c_o * widen<T>(o[at + i]) + c_a * a[i]; };
    T sum[1] = {T(0)}, squares[1] = {T(0)};
    for (int64_t i = threadIdx.x; i < s.d; i += kThreads) sum[0] += joint(i);
    block_sum(sum);
    const T m = sum[0] / T(s.d);
    for (int64_t i = threadIdx.x; i < s.d; i += kThreads) {
      const T centred = joint(i) - m;  // again, in full precision; the caches hold the row
      squares[0] += centred * centred;
    }
    block_sum(squares);
    const T r = T(1) / sqrt(squares[0] / T(s.d) + eps);
    for (int64_t i = threadIdx.x; i < s.d; i += kThreads) {
      const T v = joint(i);
      x1[at + i] = Narrow<S>::from(v);
      y[at + i] = Narrow<S>::from((v - m) * r * s.weight[i] + bias[i]);
    }
    if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;
  }
}

// Slot p * n + token of each partial sum belongs to the block of that part and token.
template <typename T, typename S>
__global__ void backward_kernel(Stream<T> s, const S* of_x1, const S* of_y, const S* x1, const S* o, const T* mean,
                                const T* rstd, S* g, T* total, T* of_o, T* d_weight, T* d_bias, int parts) {
  for (int64_t slot = blockIdx.x; slot < parts * s.n; slot += gridDim.x) {
    const int64_t part = slot / s.n, token = slot % s.n;
    T product = T(0);
    bool first = true;
    for (int64_t b = part; b < s.batch; b += parts, first = false) {
      const int64_t row = b * s.n + token, at = row * s.d;
      const T m = mean[row], r = rstd[row];
      const auto centred = [&](int64_t i) { return (widen<T>(x1[at + i]) - m) * r; };
      T sums[2] = {T(0), T(0)};
      for (int64_t i = threadIdx.x; i < s.d; i += kThreads) {
        const T scaled = widen<T>(of_y[at + i]) * s.weight[i];
        sums[0] += scaled, sums[1] += scaled * centred(i);
      }
      block_sum(sums);
      sums[0] /= T(s.d), sums[1] /= T(s.d);
      for (int64_t i = threadIdx.x; i < s.d; i += kThreads) {
        const T slope = widen<T>(of_y[at + i]), c = centred(i);
        const T whole = widen<T>(of_x1[at + i]) + r * (slope * s.weight[i] - sums[0] - c * sums[1]);
        g[at + i] = Narrow<S>::from(whole);
        const int64_t mine = slot * s.d + i;
        if (total) total[mine] = (first ? T(0) : total[mine]) + whole;
        if (o) product += whole * widen<T>(o[at + i]);
        if (d_weight) {
          d_weight[mine] = (first ? T(0) : d_weight[mine]) + slope * c;
          d_bias[mine] = (first ? T(0) : d_bias[mine]) + slope;
        }
      }
    }
    if (o) {
      T sum[1] = {product};
      block_sum(sum);
      if (threadIdx.x == 0) of_o[slot] = sum[0];
    }
  }
}

// out[j] = sum over i of in[i, j], in the order of i.
template <typename T>
__global__ void add_rows_kernel(T* out, const T* in, int64_t rows, int64_t width) {
  for (int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x; j < width; j += int64_t(gridDim.x) * kThreads) {
    T sum = T(0);
    for (int64_t i = 0; i < rows; ++i) sum += in[i * width + j];
    out[j] = sum;
  }
}

unsigned blocks_of(int64_t jobs) { return unsigned(jobs < (1 << 20) ? jobs : 1 << 20); }

template <typename T>
void add_rows(T* out, const T* in, int64_t rows, int64_t width, cudaStream_t stream) {
  add_rows_kernel<<<blocks_of((width + kThreads - 1) / kThreads), kThreads, 0, stream>>>(out, in, rows, width);
}

// Calls f with a value of the stream's type.
template <typename T, class F>
void with_stream_type(const Stream<T>& s, const F& f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else {
    if (s.type == DataType::kBFloat16) f(__nv_bfloat16{});
    else if (s.type == DataType::kFloat16) f(__half{});
    else f(float{});
  }
}

}  // namespace

template <typename T>
int anchored_residual(const Stream<T>& s, const void* x0, const void* o, const T* anchor, const T* mix, const T* bias, T eps,
                      void* x1, void* y, T* mean, T* rstd, void* stream) {
  if (s.batch * s.n * s.d == 0) return 0;
  with_stream_type(s, [&](auto value) {
    using S = decltype(value);
    forward_kernel<T, S><<<blocks_of(s.batch * s.n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        s, static_cast<const S*>(x0), static_cast<const S*>(o), anchor, mix, bias, eps, static_cast<S*>(x1),
        static_cast<S*>(y), mean, rstd);
  });
  return cudaGetLastError();
}

template <typename T>
int anchored_residual_backward(const Stream<T>& s, const void* of_x1, const void* of_y, const void* x1, const void* o,
                               const T* mean, const T* rstd, void* g, T* total, T* of_o, T* d_weight, T* d_bias, int parts,
                               T* workspace, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto zero = [&](T* t, int64_t size) {
    if (t != nullptr) cudaMemsetAsync(t, 0, size * sizeof(T), queue);
  };
  if (s.batch * s.n * s.d == 0) {  // sums over nothing
    zero(total, s.n * s.d), zero(of_o, 1), zero(d_weight, s.d), zero(d_bias, s.d);
    return cudaGetLastError();
  }
  const int64_t slots = parts * s.n;
  T *totals = workspace, *weights = totals + slots * s.d, *biases = weights + slots * s.d, *products = biases + slots * s.d;
  with_stream_type(s, [&](auto value) {
    using S = decltype(value);
    backward_kernel<T, S><<<blocks_of(slots), kThreads, 0, queue>>>(
        s, static_cast<const S*>(of_x1), static_cast<const S*>(of_y), static_cast<const S*>(x1), static_cast<const S*>(o),
        mean, rstd, static_cast<S*>(g), total ? totals : nullptr, products, d_weight ? weights : nullptr, biases, parts);
  });
  if (total != nullptr) add_rows(total, totals, parts, s.n * s.d, queue);
  if (of_o != nullptr) add_rows(of_o, products, slots, 1, queue);
  if (d_weight != nullptr) {
    add_rows(d_weight, weights, slots, s.d, queue);
    add_rows(d_bias, biases, slots, s.d, queue);
  }
  return cudaGetLastError();
}

template int anchored_residual<float>(const Stream<float>&, const void*, const void*, const float*, const float*, const float*,
                                      float, void*, void*, float*, float*, void*);
template int anchored_residual<double>(const Stream<double>&, const void*, const void*, const double*, const double*,
                                       const double*, double, void*, void*, double*, double*, void*);
template int anchored_residual_backward<float>(const Stream<float>&, const void*, const void*, const void*, const void*,
                                               const float*, const float*, void*, float*, float*, float*, float*, int,
                                               float*, void*);
template int anchored_residual_backward<double>(const Stream<double>&, const void*, const void*, const void*, const void*,
                                                const double*, const double*, void*, double*, double*, double*, double*,
                                                int, double*, void*);

}  // namespace rvlm::cuda
