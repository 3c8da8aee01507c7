// Residual, anchor and LayerNorm in one pass on the CPU, forward and backward. A thread owns some tokens next to each other
// and takes them sample by sample, as they lie in memory, so that sums over the batch need no atomics and do not depend on
// the number of threads.
// The specification is the eager reference in rvlm/ops/attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

template <typename T>
RVLM_INLINE void forward_loop(const T* __restrict x0, const T* __restrict o, const T* __restrict anchor, T c_o, T c_a,
                              const T* __restrict weight, const T* __restrict bias, T eps, T* __restrict x1,
                              T* __restrict y, T* mean, T* rstd, int64_t d) {
  T sum = T(0), squares = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < d; ++i) {
    x1[i] = x0[i] + c_o * o[i] + c_a * anchor[i];
    sum += x1[i];
  }
  const T m = sum / T(d);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < d; ++i) squares += (x1[i] - m) * (x1[i] - m);
  const T r = T(1) / std::sqrt(squares / T(d) + eps);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) y[i] = (x1[i] - m) * r * weight[i] + bias[i];
  *mean = m, *rstd = r;
}

// Writes g, adds g to `total`, of_y's share to d_weight and d_bias, and returns the sum of g * o, where those are not null.
template <typename T>
RVLM_INLINE T backward_loop(const T* __restrict of_x1, const T* __restrict of_y, const T* __restrict x1,
                            const T* __restrict o, T mean, T rstd, const T* __restrict weight, T* __restrict g,
                            T* __restrict total, T* __restrict d_weight, T* __restrict d_bias, int64_t d) {
  T first = T(0), second = T(0), of_o = T(0);
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < d; ++i) {
    const T scaled = of_y[i] * weight[i];
    first += scaled;
    second += scaled * ((x1[i] - mean) * rstd);
  }
  first /= T(d), second /= T(d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i)
    g[i] = of_x1[i] + rstd * (of_y[i] * weight[i] - first - (x1[i] - mean) * rstd * second);
  if (total) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) total[i] += g[i];
  }
  if (o) {
#pragma omp simd reduction(+ : of_o)
    for (int64_t i = 0; i < d; ++i) of_o += g[i] * o[i];
  }
  if (d_weight) {
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      d_weight[i] += of_y[i] * ((x1[i] - mean) * rstd);
      d_bias[i] += of_y[i];
    }
  }
  return of_o;
}

#define RVLM_LEAVES(T)                                                                                                 \
  RVLM_CLONES void forward_leaf(const T* x0, const T* o, const T* anchor, T c_o, T c_a, const T* weight,               \
                                const T* bias, T eps, T* x1, T* y, T* mean, T* rstd, int64_t d) {                      \
    forward_loop(x0, o, anchor, c_o, c_a, weight, bias, eps, x1, y, mean, rstd, d);                                    \
  }                                                                                                                    \
  RVLM_CLONES T backward_leaf(const T* of_x1, const T* of_y, const T* x1, const T* o, T mean, T rstd, const T* weight, \
                              T* g, T* total, T* d_weight, T* d_bias, int64_t d) {                                     \
    return backward_loop(of_x1, of_y, x1, o, mean, rstd, weight, g, total, d_weight, d_bias, d);                       \
  }
RVLM_LEAVES(float)
RVLM_LEAVES(double)

template <typename T>
void forward_batch(const Tensor& x0, const Tensor& o, const Tensor& anchor, const Tensor& mix, const Tensor& weight,
                   const Tensor& bias, double eps, Tensor& x1, Tensor& y, Tensor& mean, Tensor& rstd) {
  const int64_t rows = x0.size(0) * x0.size(1), n = x0.size(1), d = x0.size(2);
  const T c_o = in<T>(mix)[0], c_a = in<T>(mix)[1];
  T *to_x1 = out<T>(x1), *to_y = out<T>(y), *to_mean = out<T>(mean), *to_rstd = out<T>(rstd);
  torch::stable::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      forward_leaf(in<T>(x0) + row * d, in<T>(o) + row * d, in<T>(anchor) + row % n * d, c_o, c_a, in<T>(weight),
                   in<T>(bias), T(eps), to_x1 + row * d, to_y + row * d, to_mean + row, to_rstd + row, d);
  });
}

template <typename T>
void backward_batch(const Tensor& of_x1, const Tensor& of_y, const Tensor& x1, const T* o, const Tensor& mean,
                    const Tensor& rstd, const Tensor& weight, Tensor& g, Tensor& total, Tensor& of_o, Tensor& d_weight,
                    Tensor& d_bias) {
  const int64_t batch = x1.size(0), n = x1.size(1), d = x1.size(2);
  T *to_g = out<T>(g), *to_total = out<T>(total), *to_weight = out<T>(d_weight), *to_bias = out<T>(d_bias);
  std::vector<double> products(n, 0.0);
  std::vector<T> norms(to_weight ? 2 * n * d : 0, T(0));  // a part of the LayerNorm's gradients for each token
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    if (to_total) std::fill(to_total + begin * d, to_total + end * d, T(0));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t row = b * n + token;
        T *sum = to_total ? to_total + token * d : nullptr, *part = to_weight ? &norms[2 * token * d] : nullptr;
        products[token] += backward_leaf(in<T>(of_x1) + row * d, in<T>(of_y) + row * d, in<T>(x1) + row * d,
                                         o ? o + row * d : nullptr, in<T>(mean)[row], in<T>(rstd)[row], in<T>(weight),
                                         to_g + row * d, sum, part, part ? part + d : nullptr, d);
      }
    }
  });
  if (o) out<T>(of_o)[0] = T(std::accumulate(products.begin(), products.end(), 0.0));
  if (to_weight) {
    std::fill(to_weight, to_weight + d, T(0)), std::fill(to_bias, to_bias + d, T(0));
    for (int64_t token = 0; token < n; ++token)
      for (int64_t i = 0; i < d; ++i) to_weight[i] += norms[2 * token * d + i], to_bias[i] += norms[(2 * token + 1) * d + i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> anchored_residual(Tensor x0, Tensor o, Tensor anchor, Tensor mix,
                                                             Tensor weight, Tensor bias, double eps) {
  check_dense({&x0, &o, &anchor, &mix, &weight, &bias});
  Tensor x1 = torch::stable::empty_like(x0), y = torch::stable::empty_like(x0);
  Tensor mean = torch::stable::new_empty(x0, {x0.size(0), x0.size(1)}), rstd = torch::stable::empty_like(mean);
  if (x0.scalar_type() == ScalarType::Double)
    forward_batch<double>(x0, o, anchor, mix, weight, bias, eps, x1, y, mean, rstd);
  else
    forward_batch<float>(x0, o, anchor, mix, weight, bias, eps, x1, y, mean, rstd);
  return {x1, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> anchored_residual_backward(Tensor of_x1, Tensor of_y, Tensor x1,
                                                                              std::optional<Tensor> o, Tensor mean,
                                                                              Tensor rstd, Tensor weight,
                                                                              bool anchor_grad, bool norm_grad) {
  check_dense({&of_x1, &of_y, &x1, o ? &*o : &x1, &mean, &rstd, &weight});
  const int64_t n = x1.size(1), d = x1.size(2);
  const auto make = [&](bool wanted, int64_t size) { return torch::stable::new_empty(mean, {wanted ? size : 0}); };
  Tensor g = torch::stable::empty_like(x1), of_o = make(o.has_value(), 1);
  Tensor total = anchor_grad ? torch::stable::new_empty(mean, {n, d}) : make(false, 0);
  Tensor d_weight = make(norm_grad, d), d_bias = make(norm_grad, d);
  if (x1.scalar_type() == ScalarType::Double)
    backward_batch<double>(of_x1, of_y, x1, o ? in<double>(*o) : nullptr, mean, rstd, weight, g, total, of_o, d_weight, d_bias);
  else
    backward_batch<float>(of_x1, of_y, x1, o ? in<float>(*o) : nullptr, mean, rstd, weight, g, total, of_o, d_weight, d_bias);
  return {g, total, of_o, d_weight, d_bias};
}

template <class Library>
void register_attention(Library& m) {
  m.impl("anchored_residual", TORCH_BOX(&anchored_residual));
  m.impl("anchored_residual_backward", TORCH_BOX(&anchored_residual_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) { register_attention(m); }
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) { register_attention(m); }
