// Steps that look back, and the book-keeping of the best iterate, on the CPU: one pass over memory each (two for mi).
// The specification is the eager reference in rvlm/ops/iterates.py.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "batch.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

template <typename T, typename G>
RVLM_INLINE void apgd_loop(T* __restrict x_prev, const T* __restrict x_adv, const G* __restrict grad,
                           const T* __restrict x, T step, T eps, T a, T rest, Box<T> box, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    x_prev[i] = apgd_pixel(x_prev[i], x_adv[i], static_cast<T>(grad[i]), x[i], step, eps, a, rest, box);
}

// share = 1 / ||g||_1 for mi, 0 where the row adds nothing.
template <typename T, typename G, bool kSign>
RVLM_INLINE void momentum_loop(T* __restrict x_adv, T* __restrict velocity, const G* __restrict grad,
                               const T* __restrict x, T alpha, T eps, T mu, T share, Box<T> box, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T raw = static_cast<T>(grad[i]), g = raw != raw ? T(0) : raw;
    const T scaled = share == T(0) ? T(0) : share * g;
    const T v = kSign ? sign(mu * velocity[i] + sign(g)) : mu * velocity[i] + scaled;
    velocity[i] = v;
    x_adv[i] = linf_pixel<T, false>(x_adv[i], v, x[i], alpha, eps, box);
  }
}

template <typename T, typename G>
RVLM_INLINE double l1_loop(const G* grad, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const T g = static_cast<T>(grad[i]);
    total += g != g ? 0.0 : double(std::fabs(g));
  }
  return total;
}

#define RVLM_LEAVES(T, G)                                                                                              \
  RVLM_CLONES void apgd_leaf(T* x_prev, const T* x_adv, const G* grad, const T* x, T step, T eps, T a, T rest,         \
                             Box<T> box, int64_t n) {                                                                  \
    apgd_loop(x_prev, x_adv, grad, x, step, eps, a, rest, box, n);                                                     \
  }                                                                                                                    \
  RVLM_CLONES void mi_leaf(T* x_adv, T* velocity, const G* grad, const T* x, T alpha, T eps, T mu, T share,            \
                           Box<T> box, int64_t n) {                                                                    \
    momentum_loop<T, G, false>(x_adv, velocity, grad, x, alpha, eps, mu, share, box, n);                               \
  }                                                                                                                    \
  RVLM_CLONES void sign_leaf(T* x_adv, T* velocity, const G* grad, const T* x, T alpha, T eps, T mu, Box<T> box,       \
                             int64_t n) {                                                                              \
    momentum_loop<T, G, true>(x_adv, velocity, grad, x, alpha, eps, mu, T(0), box, n);                                 \
  }                                                                                                                    \
  RVLM_CLONES double l1_leaf(const T*, const G* grad, int64_t n) { return l1_loop<T, G>(grad, n); }
RVLM_LEAVES(float, float)
RVLM_LEAVES(float, BFloat16)
RVLM_LEAVES(float, Half)
RVLM_LEAVES(double, double)

template <typename T, typename G>
void apgd_batch(Tensor& x_prev, const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& step,
                const Tensor& eps, double a, double lo, double hi, const std::optional<Tensor>& active) {
  const auto b = make_batch<T>(x_prev, x_adv, grad, x, step, eps, lo, hi, active, 0.0);
  const G* g = static_cast<const G*>(grad.const_data_ptr());
  for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
    apgd_leaf(b.out + at, b.x_adv + at, g + at, b.x + at, b.alpha[row * b.alpha_stride], b.eps[row * b.eps_stride], T(a),
              T(1 - a), b.box, length);
  });
}

template <typename T, typename G>
void momentum_batch(Tensor& x_adv, Tensor& velocity, const Tensor& grad, const Tensor& x, const Tensor& alpha,
                    const Tensor& eps, double mu, bool sign, double lo, double hi, const std::optional<Tensor>& active) {
  const auto b = make_batch<T>(x_adv, x_adv, grad, x, alpha, eps, lo, hi, active, 0.0);
  check_same_layout(x_adv, velocity, "velocity");
  T* v = static_cast<T*>(velocity.mutable_data_ptr());
  const G* g = static_cast<const G*>(grad.const_data_ptr());
  std::vector<double> parts(sign ? 0 : b.rows * b.chunks, 0.0);
  std::vector<T> share(b.rows, T(0));
  if (!sign) {
    for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
      parts[row * b.chunks + (at - row * b.n) / kChunk] = l1_leaf(static_cast<const T*>(nullptr), g + at, length);
    });
    for (int64_t row = 0; row < b.rows; ++row) {
      double total = 0;
      for (int64_t chunk = 0; chunk < b.chunks; ++chunk) total += parts[row * b.chunks + chunk];
      share[row] = total > 0 && std::isfinite(total) ? T(1 / total) : T(0);
    }
  }
  for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
    const T alpha = b.alpha[row * b.alpha_stride], eps = b.eps[row * b.eps_stride];
    if (sign) sign_leaf(b.out + at, v + at, g + at, b.x + at, alpha, eps, T(mu), b.box, length);
    else mi_leaf(b.out + at, v + at, g + at, b.x + at, alpha, eps, T(mu), share[row], b.box, length);
  });
}

void apgd_step_(Tensor x_prev, Tensor x_adv, Tensor grad, Tensor x, Tensor step, Tensor eps, double a, double lo,
                double hi, std::optional<Tensor> active) {
  with_types(x, grad, [&](auto t, auto g) {
    apgd_batch<decltype(t), decltype(g)>(x_prev, x_adv, grad, x, step, eps, a, lo, hi, active);
  });
}

void momentum_step_(Tensor x_adv, Tensor velocity, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double mu,
                    int64_t kind, double lo, double hi, std::optional<Tensor> active) {
  with_types(x, grad, [&](auto t, auto g) {
    momentum_batch<decltype(t), decltype(g)>(x_adv, velocity, grad, x, alpha, eps, mu, kind == 1, lo, hi, active);
  });
}

void keep_best_(Tensor best, Tensor src, Tensor flag) {
  check_same_layout(best, src, "src");
  const int64_t rows = best.size(0), bytes = rows ? best.numel() / rows * best.element_size() : 0;
  STD_TORCH_CHECK(flag.numel() == rows && flag.is_contiguous(), "flag must have ", rows, " elements, contiguous, got ",
                  flag.numel());
  const bool* keep = static_cast<const bool*>(flag.const_data_ptr());
  char* to = static_cast<char*>(best.mutable_data_ptr());
  const char* from = static_cast<const char*>(src.const_data_ptr());
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (keep[row]) std::memcpy(to + row * bytes, from + row * bytes, bytes);
  });
}

template <class Library>
void register_iterates(Library& m) {
  m.impl("apgd_step_", TORCH_BOX(&apgd_step_));
  m.impl("momentum_step_", TORCH_BOX(&momentum_step_));
  m.impl("keep_best_", TORCH_BOX(&keep_best_));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) { register_iterates(m); }
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) { register_iterates(m); }
