// Attack steps on the CPU: one pass over memory each (two for l2), rows cut into fixed chunks so that results do not
// depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "batch.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

constexpr int kSums = 8;             // independent float64 sums, so that the compiler can vectorise a reduction

// Leaf loops. target_clones needs plain functions, so each type pair gets its own around one inlined template.
template <typename T, typename G, bool kQuantize>
RVLM_INLINE void linf_loop(T* out, const T* x_adv, const G* grad, const T* x, T alpha, T eps, Box<T> box, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = linf_pixel<T, kQuantize>(x_adv[i], static_cast<T>(grad[i]), x[i], alpha, eps, box);
}

template <typename T, typename G, bool kQuantize>
RVLM_INLINE void l2_loop(T* out, const T* x_adv, const G* grad, const T* x, T scale, T shrink, Box<T> box, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = l2_pixel<T, kQuantize>(x_adv[i], static_cast<T>(grad[i]), x[i], scale, shrink, box);
}

template <typename T, typename G>
RVLM_INLINE void l2_sums_loop(double* sums, const T* x_adv, const G* grad, const T* x, int64_t n) {
  double gg[kSums] = {}, dg[kSums] = {}, dd[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums) {
    const int lanes = static_cast<int>(std::min<int64_t>(kSums, n - i));
    for (int k = 0; k < lanes; ++k) {
      const double g = static_cast<T>(grad[i + k]), d = x_adv[i + k] - x[i + k];
      gg[k] += g * g, dg[k] += d * g, dd[k] += d * d;
    }
  }
  for (int k = 0; k < kSums; ++k) sums[0] += gg[k], sums[1] += dg[k], sums[2] += dd[k];
}

#define RVLM_LEAVES(T, G)                                                                                              \
  RVLM_CLONES void linf_leaf(T* out, const T* x_adv, const G* grad, const T* x, T alpha, T eps, Box<T> box,            \
                             int64_t n) {                                                                              \
    box.levels != T(0) ? linf_loop<T, G, true>(out, x_adv, grad, x, alpha, eps, box, n)                                \
                       : linf_loop<T, G, false>(out, x_adv, grad, x, alpha, eps, box, n);                              \
  }                                                                                                                    \
  RVLM_CLONES void l2_leaf(T* out, const T* x_adv, const G* grad, const T* x, T scale, T shrink, Box<T> box,           \
                           int64_t n) {                                                                                \
    box.levels != T(0) ? l2_loop<T, G, true>(out, x_adv, grad, x, scale, shrink, box, n)                               \
                       : l2_loop<T, G, false>(out, x_adv, grad, x, scale, shrink, box, n);                             \
  }                                                                                                                    \
  RVLM_CLONES void l2_sums_leaf(double* sums, const T* x_adv, const G* grad, const T* x, int64_t n) {                  \
    l2_sums_loop<T, G>(sums, x_adv, grad, x, n);                                                                       \
  }
RVLM_LEAVES(float, float)
RVLM_LEAVES(float, BFloat16)
RVLM_LEAVES(float, Half)
RVLM_LEAVES(double, double)

template <typename T>
RVLM_INLINE void start_loop(T* out, const T* x, T eps, uint64_t id, uint64_t seed, uint32_t stream, T lo, T hi,
                            int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 4) {
    const Philox random(uint32_t(i / 4), uint32_t(id), uint32_t(id >> 32), stream, seed);
    for (int k = 0; k < 4 && i + k < end; ++k) out[i + k] = start_pixel(random.word[k], x[i + k], eps, lo, hi);
  }
}
RVLM_CLONES void start_leaf(float* out, const float* x, float eps, uint64_t id, uint64_t seed, uint32_t stream,
                            float lo, float hi, int64_t begin, int64_t end) {
  start_loop(out, x, eps, id, seed, stream, lo, hi, begin, end);
}
RVLM_CLONES void start_leaf(double* out, const double* x, double eps, uint64_t id, uint64_t seed, uint32_t stream,
                            double lo, double hi, int64_t begin, int64_t end) {
  start_loop(out, x, eps, id, seed, stream, lo, hi, begin, end);
}

template <typename T, typename G>
void linf_batch(const Batch<T>& b, const G* grad) {
  for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
    linf_leaf(b.out + at, b.x_adv + at, grad + at, b.x + at, b.alpha[row * b.alpha_stride], b.eps[row * b.eps_stride],
              b.box, length);
  });
}

template <typename T, typename G>
void l2_batch(const Batch<T>& b, const G* grad) {
  std::vector<double> partial(b.rows * b.chunks * 3, 0.0);
  for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
    double* sums = &partial[(row * b.chunks + (at - row * b.n) / kChunk) * 3];
    l2_sums_leaf(sums, b.x_adv + at, grad + at, b.x + at, length);
  });
  std::vector<T> scale(b.rows), shrink(b.rows);
  for (int64_t row = 0; row < b.rows; ++row) {
    double sums[3] = {};
    for (int64_t chunk = 0; chunk < b.chunks; ++chunk)
      for (int k = 0; k < 3; ++k) sums[k] += partial[(row * b.chunks + chunk) * 3 + k];
    l2_factors(sums[0], sums[1], sums[2], b.alpha[row * b.alpha_stride], b.eps[row * b.eps_stride], scale[row],
               shrink[row]);
  }
  for_chunks(b, [&](int64_t row, int64_t at, int64_t length) {
    l2_leaf(b.out + at, b.x_adv + at, grad + at, b.x + at, scale[row], shrink[row], b.box, length);
  });
}

struct Linf {
  template <typename T, typename G>
  static void run(const Batch<T>& b, const G* grad) { linf_batch(b, grad); }
};
struct L2 {
  template <typename T, typename G>
  static void run(const Batch<T>& b, const G* grad) { l2_batch(b, grad); }
};

template <class Step>
void step_into(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
               const Tensor& eps, double lo, double hi, const std::optional<Tensor>& active, double levels) {
  with_types(x_adv, grad, [&](auto t, auto g) {
    Step::run(make_batch<decltype(t)>(out, x_adv, grad, x, alpha, eps, lo, hi, active, levels), in<decltype(g)>(grad));
  });
}

void linf_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
                std::optional<Tensor> active, double levels) {
  step_into<Linf>(x_adv, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
}

Tensor linf_step(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
                 std::optional<Tensor> active, double levels) {
  Tensor out = torch::stable::empty_like(x_adv);
  step_into<Linf>(out, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
  return out;
}

void l2_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
              std::optional<Tensor> active, double levels) {
  step_into<L2>(x_adv, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
}

template <typename T>
void start_into(Tensor& out, const Tensor& x, const Tensor& eps, const Tensor& ids, int64_t seed, double lo, double hi,
                int64_t stream) {
  const int64_t rows = x.size(0), n = rows ? x.numel() / rows : 0, chunks = (n + kChunk - 1) / kChunk;
  check_per_row(eps, rows, "eps");
  STD_TORCH_CHECK(ids.numel() == rows && ids.is_contiguous(), "sample_ids must have ", rows,
                  " elements, contiguous, got ", ids.numel());
  const int64_t eps_stride = eps.numel() > 1;
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const T* radius = static_cast<const T*>(eps.const_data_ptr());
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  torch::stable::parallel_for(0, rows * chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / chunks, first = (job % chunks) * kChunk;
      start_leaf(to + row * n, from + row * n, radius[row * eps_stride], uint64_t(id[row]), uint64_t(seed),
                 uint32_t(stream), T(lo), T(hi), first, std::min(first + kChunk, n));
    }
  });
}

Tensor uniform_start(Tensor x, Tensor eps, Tensor sample_ids, int64_t seed, double lo, double hi, int64_t stream) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous: noise is numbered by pixel, not by address");
  Tensor out = torch::stable::empty_like(x);
  if (x.scalar_type() == ScalarType::Double) start_into<double>(out, x, eps, sample_ids, seed, lo, hi, stream);
  else start_into<float>(out, x, eps, sample_ids, seed, lo, hi, stream);
  return out;
}

template <class Library>
void register_steps(Library& m) {
  m.impl("linf_step_", TORCH_BOX(&linf_step_));
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("l2_step_", TORCH_BOX(&l2_step_));
  m.impl("uniform_start", TORCH_BOX(&uniform_start));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) { register_steps(m); }
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) { register_steps(m); }
