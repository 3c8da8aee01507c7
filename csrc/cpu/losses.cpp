// Losses that attacks raise, on the CPU: value, verdict and gradient of a row of logits, without a sort.
// The specification is the eager reference in rvlm/ops/losses.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../checks.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

enum Kind : int64_t { kCe, kCw, kDlr, kDlrTargeted, kSoftCe };
constexpr int64_t kGrain = 4;  // rows a thread takes at least

template <typename T>
RVLM_INLINE bool any_nan_loop(const T* z, int64_t n) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += z[i] != z[i];
  return count > 0;
}

template <typename T>
RVLM_INLINE T max_loop(const T* z, int64_t n) {
  T high = -kInf<T>;
#pragma omp simd reduction(max : high)
  for (int64_t i = 0; i < n; ++i) high = z[i] > high ? z[i] : high;
  return high;
}

// out = exp(z - shift); returns the sum.
template <typename T>
RVLM_INLINE T exp_loop(const T* __restrict z, T shift, T* __restrict out, int64_t n) {
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = exp_(z[i] - shift);
    total += out[i];
  }
  return total;
}

template <typename T>
RVLM_INLINE void soft_loop(const T* __restrict z, const T* __restrict y, T shift, T norm, T factor, T* __restrict grad, T* loss,
                           int64_t n) {
  T sum = T(0), weight = T(0);
#pragma omp simd reduction(+ : sum, weight)
  for (int64_t i = 0; i < n; ++i) {
    const T term = y[i] * (norm - (z[i] - shift));
    sum += y[i] > T(0) ? term : T(0);
    weight += y[i];
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] = weight * factor * grad[i] - y[i];
  *loss = sum;
}

template <typename T>
RVLM_INLINE void scale_loop(T* grad, T factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad[i] *= factor;
}

#define RVLM_LEAVES(T)                                                                                                \
  RVLM_CLONES bool any_nan_leaf(const T* z, int64_t n) { return any_nan_loop(z, n); }                                 \
  RVLM_CLONES T max_leaf(const T* z, int64_t n) { return max_loop(z, n); }                                            \
  RVLM_CLONES T exp_leaf(const T* z, T shift, T* out, int64_t n) { return exp_loop(z, shift, out, n); }               \
  RVLM_CLONES void soft_leaf(const T* z, const T* y, T shift, T norm, T factor, T* grad, T* loss, int64_t n) {        \
    soft_loop(z, y, shift, norm, factor, grad, loss, n);                                                                     \
  }                                                                                                                   \
  RVLM_CLONES void scale_leaf(T* grad, T factor, int64_t n) { scale_loop(grad, factor, n); }
RVLM_LEAVES(float)
RVLM_LEAVES(double)

// The four largest logits and their columns, the first of equal ones first; and the best beside column `skip`.
template <typename T>
struct Top {
  T value[4];
  int64_t at[4];
  int64_t other;

  Top(const T* z, int64_t n, int64_t skip) : other(-1) {
    for (int k = 0; k < 4; ++k) value[k] = -kInf<T>, at[k] = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (i != skip && (other < 0 || z[i] > z[other])) other = i;
      if (at[3] >= 0 && !(z[i] > value[3])) continue;
      int k = 3;
      for (; k > 0 && (at[k - 1] < 0 || z[i] > value[k - 1]); --k) value[k] = value[k - 1], at[k] = at[k - 1];
      value[k] = z[i], at[k] = i;
    }
  }
};

template <typename T>
int64_t first_of(const T* z, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (z[i] == value) return i;
  return -1;
}

template <typename T>
T finite_or_zero(T high) { return high == -kInf<T> ? T(0) : high; }

// softplus(m) with m = logsumexp beside y - z_y: no difference of numbers that are nearly equal.
template <typename T>
T ce_row(const T* z, int64_t y, T* grad, int64_t n) {
  T high = -kInf<T>;
  if (y > 0) high = max_leaf(z, y);
  if (y + 1 < n) high = std::max(high, max_leaf(z + y + 1, n - y - 1));
  const T shift = finite_or_zero(high);
  T total = y > 0 ? exp_leaf(z, shift, grad, y) : T(0);
  if (y + 1 < n) total += exp_leaf(z + y + 1, shift, grad + y + 1, n - y - 1);
  const T m = (shift - z[y]) + std::log(total), small = std::exp(-std::fabs(m));
  const T slope = (m > T(0) ? T(1) : small) / (T(1) + small);
  grad[y] = T(0);
  scale_leaf(grad, total > T(0) ? slope / total : T(0), n);
  grad[y] = -slope;
  return std::max(m, T(0)) + std::log1p(small);
}

template <typename T>
T soft_ce_row(const T* z, const T* y, T* grad, int64_t n) {
  const T shift = finite_or_zero(max_leaf(z, n));
  const T total = exp_leaf(z, shift, grad, n);
  T loss;
  soft_leaf(z, y, shift, std::log(total), T(1) / total, grad, &loss, n);
  return loss;
}

template <typename T>
T margin_row(const T* z, int64_t y, int64_t target, Kind kind, const Top<T>& top, T* grad, int64_t n) {
  std::fill(grad, grad + n, T(0));
  const int64_t other = kind == kDlrTargeted ? target : top.other;
  const T gap = z[other] - z[y];
  if (kind == kCw) {
    grad[other] += T(1), grad[y] -= T(1);
    return gap;
  }
  const T low = kind == kDlr ? top.value[2] : T(0.5) * (top.value[2] + top.value[3]);
  const T scale = top.value[0] - low + T(1e-12), loss = gap / scale, slope = loss / scale;
  grad[other] += T(1) / scale, grad[y] -= T(1) / scale, grad[top.at[0]] -= slope;
  if (kind == kDlr) grad[top.at[2]] += slope;
  else grad[top.at[2]] += T(0.5) * slope, grad[top.at[3]] += T(0.5) * slope;
  return loss;
}

template <typename T>
void loss_batch(const Tensor& logits, const Tensor& y, const std::optional<Tensor>& target, Kind kind, Tensor& loss,
                Tensor& correct, Tensor& grad) {
  const int64_t rows = logits.size(0), n = logits.size(1);
  const T *all = static_cast<const T*>(logits.const_data_ptr()), *soft = nullptr;
  const int64_t *labels = nullptr, *targets = nullptr;
  if (kind == kSoftCe) soft = static_cast<const T*>(y.const_data_ptr());
  else labels = static_cast<const int64_t*>(y.const_data_ptr());
  if (kind == kDlrTargeted) targets = static_cast<const int64_t*>(target->const_data_ptr());
  T *losses = static_cast<T*>(loss.mutable_data_ptr()), *grads = static_cast<T*>(grad.mutable_data_ptr());
  bool* verdicts = static_cast<bool*>(correct.mutable_data_ptr());
  for (int64_t row = 0; row < rows && labels; ++row) {
    STD_TORCH_CHECK(labels[row] >= 0 && labels[row] < n, "y must lie in 0 .. ", n - 1, ", got ", labels[row]);
    if (targets)
      STD_TORCH_CHECK(targets[row] >= 0 && targets[row] < n, "target must lie in 0 .. ", n - 1, ", got ", targets[row]);
  }
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* z = all + row * n;
      T* to = grads + row * n;
      if (any_nan_leaf(z, n)) {
        losses[row] = std::numeric_limits<T>::quiet_NaN(), verdicts[row] = false;
        std::fill(to, to + n, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      if (kind == kSoftCe) {
        const T* weights = soft + row * n;
        losses[row] = soft_ce_row(z, weights, to, n);
        verdicts[row] = first_of(z, max_leaf(z, n), n) == first_of(weights, max_leaf(weights, n), n);
      } else if (kind == kCe) {
        losses[row] = ce_row(z, labels[row], to, n);
        verdicts[row] = first_of(z, max_leaf(z, n), n) == labels[row];
      } else {
        const Top<T> top(z, n, labels[row]);
        losses[row] = margin_row(z, labels[row], targets ? targets[row] : -1, kind, top, to, n);
        verdicts[row] = top.at[0] == labels[row];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> attack_loss(Tensor logits, Tensor y, std::optional<Tensor> target, int64_t kind) {
  STD_TORCH_CHECK(logits.is_contiguous() && y.is_contiguous(), "attack_loss takes contiguous tensors: call rvlm.ops");
  Tensor loss = torch::stable::new_empty(logits, {logits.size(0)});
  Tensor correct = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Bool);
  Tensor grad = torch::stable::empty_like(logits);
  if (target && !target->is_contiguous()) target = torch::stable::clone(*target);
  if (logits.scalar_type() == ScalarType::Double)
    loss_batch<double>(logits, y, target, Kind(kind), loss, correct, grad);
  else
    loss_batch<float>(logits, y, target, Kind(kind), loss, correct, grad);
  return {loss, correct, grad};
}

template <class Library>
void register_losses(Library& m) {
  m.impl("attack_loss", TORCH_BOX(&attack_loss));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) { register_losses(m); }
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) { register_losses(m); }
