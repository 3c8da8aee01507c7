// The L1 ball on the CPU, one thread a row: the nearest point in ball and box by Newton's method on the threshold, inside
// a bracket, and the sparse step by quickselect. The specification is the eager reference in rvlm/ops/l1.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "batch.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

constexpr int kMostPasses = 100;  // Newton needs about ten; bisection alone would need sixty

// Length of the perturbation at a threshold, and how many pixels still shorten when the threshold rises.
template <typename T>
RVLM_INLINE void length_loop(const T* __restrict x_adv, const T* __restrict x, double mu, T lo, T hi, int64_t n,
                             double* length, double* moving) {
  double sum = 0, count = 0;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < n; ++i) {
    const double u = x_adv[i] - x[i], room = u > 0 ? double(hi) - double(x[i]) : double(x[i]) - double(lo);
    const double left = std::fabs(u) - mu;
    sum += left < 0 ? 0.0 : left > room ? room : left;
    count += left > 0 ? (left < room ? 1.0 : 0.0) : 0.0;
  }
  *length = sum, *moving = count;
}

template <typename T>
RVLM_INLINE T largest_loop(const T* __restrict x_adv, const T* __restrict x, int64_t n) {
  T high = 0;
  int64_t broken = 0;
#pragma omp simd reduction(max : high) reduction(+ : broken)
  for (int64_t i = 0; i < n; ++i) {
    const T size = std::fabs(x_adv[i] - x[i]);
    high = size > high ? size : high;
    broken += size < kInf<T> ? 0 : 1;
  }
  return broken ? kInf<T> : high;
}

template <typename T>
RVLM_INLINE void shrink_loop(const T* __restrict x_adv, const T* __restrict x, T* __restrict out, T mu, T lo, T hi,
                             int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T u = x_adv[i] - x[i], size = std::fabs(u) - mu, left = size < T(0) ? T(0) : size;
    out[i] = clip(x[i] + (u < T(0) ? -left : left), lo, hi);
  }
}

template <typename T>
RVLM_INLINE void box_loop(const T* __restrict x_adv, T* __restrict out, T lo, T hi, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = clip(x_adv[i], lo, hi);
}

// |g|, of which NaN is 0.
template <typename T, typename G>
RVLM_INLINE void sizes_loop(const G* __restrict grad, T* __restrict sizes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = static_cast<T>(grad[i]);
    sizes[i] = g != g ? T(0) : std::fabs(g);
  }
}

template <typename T, typename G>
RVLM_INLINE int64_t moving_loop(const G* __restrict grad, T least, int64_t n) {
  int64_t moving = 0;
#pragma omp simd reduction(+ : moving)
  for (int64_t i = 0; i < n; ++i) {
    const T size = std::fabs(static_cast<T>(grad[i]));
    moving += size > T(0) ? (size >= least ? 1 : 0) : 0;
  }
  return moving;
}

template <typename T, typename G>
RVLM_INLINE void sparse_loop(const T* __restrict x_adv, const G* __restrict grad, T* __restrict out, T least, T share,
                             int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = static_cast<T>(grad[i]);
    out[i] = x_adv[i] + (std::fabs(g) >= least ? sign(g) : T(0)) * share;
  }
}

#define RVLM_LEAVES(T)                                                                                                \
  RVLM_CLONES void length_leaf(const T* x_adv, const T* x, double mu, T lo, T hi, int64_t n, double* length,          \
                               double* moving) {                                                                      \
    length_loop(x_adv, x, mu, lo, hi, n, length, moving);                                                             \
  }                                                                                                                   \
  RVLM_CLONES T largest_leaf(const T* x_adv, const T* x, int64_t n) { return largest_loop(x_adv, x, n); }             \
  RVLM_CLONES void shrink_leaf(const T* x_adv, const T* x, T* out, T mu, T lo, T hi, int64_t n) {                     \
    shrink_loop(x_adv, x, out, mu, lo, hi, n);                                                                        \
  }                                                                                                                   \
  RVLM_CLONES void box_leaf(const T* x_adv, T* out, T lo, T hi, int64_t n) { box_loop(x_adv, out, lo, hi, n); }
RVLM_LEAVES(float)
RVLM_LEAVES(double)
#undef RVLM_LEAVES

#define RVLM_LEAVES(T, G)                                                                                             \
  RVLM_CLONES void sizes_leaf(const G* grad, T* sizes, int64_t n) { sizes_loop(grad, sizes, n); }                     \
  RVLM_CLONES int64_t moving_leaf(const G* grad, T least, int64_t n) { return moving_loop(grad, least, n); }          \
  RVLM_CLONES void sparse_leaf(const T* x_adv, const G* grad, T* out, T least, T share, int64_t n) {                  \
    sparse_loop(x_adv, grad, out, least, share, n);                                                                   \
  }
RVLM_LEAVES(float, float)
RVLM_LEAVES(float, BFloat16)
RVLM_LEAVES(float, Half)
RVLM_LEAVES(double, double)

// The smallest threshold whose perturbation is no longer than eps; 0 if none is needed.
template <typename T>
double threshold(const T* x_adv, const T* x, double eps, T lo, T hi, double largest, int64_t n) {
  double length, moving, low = 0, high = largest, mu = 0;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    length_leaf(x_adv, x, mu, lo, hi, n, &length, &moving);
    if (pass == 0 && length <= eps) return 0;
    (length > eps ? low : high) = mu;
    if (std::fabs(length - eps) <= 1e-14 * eps) return mu;
    const double newton = moving > 0 ? mu + (length - eps) / moving : low;
    const double next = newton > low && newton < high ? newton : low + (high - low) / 2;
    if (next <= low || next >= high || next == mu) break;  // no number is left inside the bracket
    mu = next;
  }
  return high;
}

template <typename T>
void project_batch(const Tensor& x_adv, const Tensor& x, const Tensor& eps, double lo, double hi, Tensor& out) {
  const int64_t rows = x.size(0), n = rows ? x.numel() / rows : 0;
  const T *from = static_cast<const T*>(x_adv.const_data_ptr()), *clean = static_cast<const T*>(x.const_data_ptr());
  const T* radius = static_cast<const T*>(eps.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *a = from + row * n, *c = clean + row * n;
      T* y = to + row * n;
      const T largest = largest_leaf(a, c, n);
      if (!(largest < kInf<T>)) {
        std::fill(y, y + n, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      const double mu = threshold(a, c, double(radius[row]), T(lo), T(hi), double(largest), n);
      if (mu == 0) box_leaf(a, y, T(lo), T(hi), n);
      else shrink_leaf(a, c, y, T(mu), T(lo), T(hi), n);
    }
  });
}

Tensor l1_project(Tensor x_adv, Tensor x, Tensor eps, double lo, double hi) {
  check_same_layout(x_adv, x, "x");
  STD_TORCH_CHECK(eps.numel() == x.size(0) && eps.is_contiguous(), "eps must have ", x.size(0),
                  " elements, contiguous, got ", eps.numel());
  Tensor out = torch::stable::empty_like(x_adv);
  if (x.scalar_type() == ScalarType::Double) project_batch<double>(x_adv, x, eps, lo, hi, out);
  else project_batch<float>(x_adv, x, eps, lo, hi, out);
  return out;
}

template <typename T, typename G>
void sparse_batch(const Tensor& x_adv, const Tensor& grad, const Tensor& alpha, const Tensor& still, Tensor& out) {
  const int64_t rows = x_adv.size(0), n = rows ? x_adv.numel() / rows : 0, stride = alpha.numel() > 1;
  if (n == 0) return;
  const T *from = in<T>(x_adv), *steps = in<T>(alpha);
  const G* slopes = in<G>(grad);
  const int64_t* ranks = in<int64_t>(still);
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> sizes(n);
    for (int64_t row = begin; row < end; ++row) {
      const G* g = slopes + row * n;
      sizes_leaf(g, sizes.data(), n);
      const auto at = sizes.begin() + std::clamp<int64_t>(ranks[row], 0, n - 1);
      std::nth_element(sizes.begin(), at, sizes.end());
      const T least = *at;
      const int64_t moving = moving_leaf(g, least, n);
      const T share = moving ? static_cast<T>(double(steps[row * stride]) / double(moving)) : T(0);
      sparse_leaf(from + row * n, g, to + row * n, least, share, n);
    }
  });
}

Tensor sparse_step(Tensor x_adv, Tensor grad, Tensor alpha, Tensor still) {
  check_same_layout(x_adv, grad, "grad");
  check_per_row(alpha, x_adv.size(0), "alpha");
  STD_TORCH_CHECK(still.numel() == x_adv.size(0) && still.scalar_type() == ScalarType::Long && still.is_contiguous(),
                  "still must be int64 [", x_adv.size(0), "], contiguous");
  Tensor out = torch::stable::empty_like(x_adv);
  with_types(x_adv, grad, [&](auto pixel, auto slope) {
    sparse_batch<decltype(pixel), decltype(slope)>(x_adv, grad, alpha, still, out);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) {
  m.impl("l1_project", TORCH_BOX(&l1_project));
  m.impl("sparse_step", TORCH_BOX(&sparse_step));
}
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) {
  m.impl("l1_project", TORCH_BOX(&l1_project));
  m.impl("sparse_step", TORCH_BOX(&sparse_step));
}
