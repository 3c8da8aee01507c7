// Divergences between students and teachers on the CPU: one thread per sample, rows of logits in the cache.
// The specification is the eager reference in rvlm/ops/distill.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

constexpr int64_t kForward = 0, kReverse = 1;

// Rows of scratch end on a whole vector, so that exponentials never run one by one; what fills them up is -inf.
constexpr int64_t kLanes = 16;

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

constexpr double kLog2 = 0.693147180559945309;

// With u = (z - high) * by and e = 2^u: log softmax = u log 2 - norm and softmax = e * factor.
template <typename T>
struct Softmax {
  T high, by, norm, factor;
  bool masked;  // some class is -inf
};

// Copies a row of logits to scratch and finds what is subtracted from it.
template <typename T>
RVLM_INLINE Softmax<T> copy_loop(const T* __restrict z, T tau, T* __restrict row, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  T high = z[0], low = z[0];
#pragma omp simd reduction(max : high) reduction(min : low)
  for (int64_t i = 0; i < whole; ++i) {
    row[i] = z[i];
    high = z[i] > high ? z[i] : high;
    low = z[i] < low ? z[i] : low;
  }
  for (int64_t i = whole; i < n; ++i) {
    row[i] = z[i];
    high = z[i] > high ? z[i] : high;
    low = z[i] < low ? z[i] : low;
  }
  std::fill(row + n, row + padded(n), -kInf<T>);
  const T by = T(1 / kLog2) / tau;
  return {high, by, T(0), T(0), (low - high) * by == -kInf<T>};
}

// u and e of a row of logits.
template <typename T>
RVLM_INLINE Softmax<T> softmax_loop(const T* __restrict z, T tau, T* __restrict u, T* __restrict e, int64_t n) {
  Softmax<T> of = copy_loop(z, tau, u, n);
  T total = T(0);
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < padded(n); ++i) {
    u[i] = (u[i] - of.high) * of.by;
    e[i] = exp2_(bounded(u[i]));
    total += e[i];
  }
  std::fill(u + n, u + padded(n), T(0));
  of.norm = std::log(total), of.factor = T(1) / total;
  return of;
}

// u and e become log softmax and softmax.
template <typename T>
RVLM_INLINE void normalise_loop(Softmax<T> of, T* __restrict u, T* __restrict e, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) u[i] = u[i] * T(kLog2) - of.norm, e[i] *= of.factor;
}

// KL(teacher || student) where the student masks nothing, and scale times its gradient added to d, unless that is null.
// u and e are the student's; the teacher's row is copied to `powers`, which then holds its exponentials.
template <typename T>
RVLM_INLINE T forward_loop(const T* __restrict teacher, T tau, Softmax<T> of, const T* __restrict u,
                           const T* __restrict e, T scale, T* __restrict powers, T* __restrict d, int64_t n) {
  const Softmax<T> own = copy_loop(teacher, tau, powers, n);
  T total = T(0), sum = T(0);
#pragma omp simd reduction(+ : total, sum)
  for (int64_t i = 0; i < padded(n); ++i) {
    const T exponent = bounded((powers[i] - own.high) * own.by);
    powers[i] = exp2_(exponent);
    total += powers[i];
    sum += powers[i] * (exponent - u[i]);
  }
  const T factor = T(1) / total;
  if (d) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) d[i] += scale * (e[i] * of.factor - powers[i] * factor);
  }
  return sum * T(kLog2) * factor + (of.norm - std::log(total));
}

template <typename T>
RVLM_INLINE void fold_loop(const T* __restrict z, T tau, T weight, T* __restrict u, T* __restrict e, T* __restrict mean,
                           int64_t n) {
  const T share = weight * softmax_loop(z, tau, u, e, n).factor;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) mean[i] += share * e[i];
}

// log(a / b), 0 where a is 0 or only b is.
template <typename T>
RVLM_INLINE T gap(T a, T log_a, T log_b) {
  const T difference = log_a - log_b;
  return log_b == -kInf<T> ? T(0) : a == T(0) ? T(0) : difference;
}

// A KL between rows: its value, and the sum of `first` over the classes that count.
template <typename T>
RVLM_INLINE void kl_loop(const T* __restrict first, const T* __restrict log_first, const T* __restrict log_second,
                         T* value, T* total, int64_t n) {
  T sum = T(0), mass = T(0);
#pragma omp simd reduction(+ : sum, mass)
  for (int64_t i = 0; i < n; ++i) {
    sum += first[i] * gap(first[i], log_first[i], log_second[i]);
    mass += log_second[i] == -kInf<T> ? T(0) : first[i];
  }
  *value = sum;
  *total = mass;
}

// Adds scale times the gradients of KL(first || second) with respect to the logits of both; either may be null.
template <typename T>
RVLM_INLINE void kl_grad_loop(const T* __restrict first, const T* __restrict log_first, const T* __restrict second,
                              const T* __restrict log_second, T value, T total, T scale, T* __restrict d_first,
                              T* __restrict d_second, int64_t n) {
  if (d_first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T counts = log_second[i] == -kInf<T> ? T(0) : T(1);
      d_first[i] += scale * (first[i] * (gap(first[i], log_first[i], log_second[i]) + (counts - total) - value));
    }
  }
  if (d_second) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T counts = log_second[i] == -kInf<T> ? T(0) : T(1);
      d_second[i] += scale * (second[i] * total - first[i] * counts);
    }
  }
}

// p and q are taken from their logarithms again: log p - log m cancels, and must do so to the bit where q is 0.
template <typename T>
RVLM_INLINE void log_mean_loop(const T* __restrict log_p, const T* __restrict log_q, T* __restrict p, T* __restrict q,
                               T* __restrict log_m, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    p[i] = exp_(log_p[i]), q[i] = exp_(log_q[i]);
    const T m = T(0.5) * (p[i] + q[i]);
    log_m[i] = log_(m == T(0) ? T(1) : m);
  }
}

template <typename T>
RVLM_INLINE void js_grad_loop(const T* __restrict a, const T* __restrict log_a, const T* __restrict log_m, T value,
                              T scale, T* __restrict d, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) d[i] += scale * (T(0.5) * a[i] * (gap(a[i], log_a[i], log_m[i]) - value));
}

#define RVLM_LEAVES(T)                                                                                                 \
  RVLM_CLONES Softmax<T> softmax_leaf(const T* z, T tau, T* u, T* e, int64_t n) {                                      \
    return softmax_loop(z, tau, u, e, n);                                                                              \
  }                                                                                                                    \
  RVLM_CLONES void normalise_leaf(Softmax<T> of, T* u, T* e, int64_t n) { normalise_loop(of, u, e, n); }               \
  RVLM_CLONES T forward_leaf(const T* teacher, T tau, Softmax<T> of, const T* u, const T* e, T scale, T* powers, T* d, \
                             int64_t n) {                                                                              \
    return forward_loop(teacher, tau, of, u, e, scale, powers, d, n);                                                  \
  }                                                                                                                    \
  RVLM_CLONES void fold_leaf(const T* z, T tau, T weight, T* u, T* e, T* mean, int64_t n) {                            \
    fold_loop(z, tau, weight, u, e, mean, n);                                                                          \
  }                                                                                                                    \
  RVLM_CLONES void kl_leaf(const T* first, const T* log_first, const T* log_second, T* value, T* total, int64_t n) {   \
    kl_loop(first, log_first, log_second, value, total, n);                                                            \
  }                                                                                                                    \
  RVLM_CLONES void kl_grad_leaf(const T* first, const T* log_first, const T* second, const T* log_second, T value,     \
                                T total, T scale, T* d_first, T* d_second, int64_t n) {                                \
    kl_grad_loop(first, log_first, second, log_second, value, total, scale, d_first, d_second, n);                     \
  }                                                                                                                    \
  RVLM_CLONES void log_mean_leaf(const T* log_p, const T* log_q, T* p, T* q, T* log_m, int64_t n) {                    \
    log_mean_loop(log_p, log_q, p, q, log_m, n);                                                                       \
  }                                                                                                                    \
  RVLM_CLONES void js_grad_leaf(const T* a, const T* log_a, const T* log_m, T value, T scale, T* d, int64_t n) {       \
    js_grad_loop(a, log_a, log_m, value, scale, d, n);                                                                 \
  }
RVLM_LEAVES(float)
RVLM_LEAVES(double)

// Rows of scratch, each on cache lines of its own.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t n) : stride_(padded(n)), memory_(rows * stride_ + kLine) {
    void* start = memory_.data();
    size_t space = memory_.size() * sizeof(T);
    first_ = static_cast<T*>(std::align(kLine * sizeof(T), rows * stride_ * sizeof(T), start, space));
  }
  T* row(int64_t k) { return first_ + k * stride_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  int64_t stride_;
  std::vector<T> memory_;
  T* first_;
};

// Everything of one teacher and one row. The first two of the five rows of scratch hold the student's softmax; `known`
// says that they, and `of`, are those of the teacher before.
template <typename T>
void one_pair(const T* student, const T* teacher, T tau, T weight, int64_t kind, bool known, Scratch<T>& scratch,
              Softmax<T>& of, T* kl, T* d_student, T* d_teacher, int64_t n) {
  T *log_q = scratch.row(0), *q = scratch.row(1), *log_p = scratch.row(2), *p = scratch.row(3), *log_m = scratch.row(4);
  const T scale = weight / tau;
  if (!known) of = softmax_leaf(student, tau, log_q, q, n);
  if (kind == kForward && !d_teacher && !of.masked) {
    *kl = forward_leaf(teacher, tau, of, log_q, q, scale, p, d_student, n);
    return;
  }
  if (!known) normalise_leaf(of, log_q, q, n);
  normalise_leaf(softmax_leaf(teacher, tau, log_p, p, n), log_p, p, n);
  T total, of_p, of_q;
  if (kind == kForward) {
    kl_leaf(p, log_p, log_q, kl, &total, n);
    kl_grad_leaf(p, log_p, q, log_q, *kl, total, scale, d_teacher, d_student, n);
  } else if (kind == kReverse) {
    kl_leaf(q, log_q, log_p, kl, &total, n);
    kl_grad_leaf(q, log_q, p, log_p, *kl, total, scale, d_student, d_teacher, n);
  } else {
    log_mean_leaf(log_p, log_q, p, q, log_m, n);
    kl_leaf(p, log_p, log_m, &of_p, &total, n);
    kl_leaf(q, log_q, log_m, &of_q, &total, n);
    *kl = T(0.5) * (of_p + of_q);
    if (d_student) js_grad_leaf(q, log_q, log_m, of_q, scale, d_student, n);
    if (d_teacher) js_grad_leaf(p, log_p, log_m, of_p, scale, d_teacher, n);
  }
}

template <typename T>
void kl_batch(const Tensor& student, const Tensor& teachers, const Tensor& weights, const Tensor& temperature,
              int64_t student_of, int64_t kind, Tensor& loss, Tensor& kl, Tensor& student_grad, Tensor& teacher_grad) {
  const int64_t count = teachers.size(0), rows = teachers.size(1), n = teachers.size(2);
  T *total = out<T>(loss), *each = out<T>(kl), *d_student = out<T>(student_grad), *d_teachers = out<T>(teacher_grad);
  const int64_t students = student.numel() / std::max<int64_t>(rows * n, 1);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(5, n);
    Softmax<T> of{};
    for (int64_t row = begin; row < end; ++row) {
      total[row] = T(0);
      for (int64_t s = 0; d_student && s < students; ++s) std::fill_n(d_student + (s * rows + row) * n, n, T(0));
      for (int64_t t = 0, last = -1; t < count; ++t) {
        const int64_t s = student_of >> (4 * t) & 15, at = (s * rows + row) * n, teacher_at = (t * rows + row) * n;
        const T weight = in<T>(weights)[t * rows + row], tau = in<T>(temperature)[t];
        if (d_teachers) std::fill_n(d_teachers + teacher_at, n, T(0));
        const bool known = s == last && tau == in<T>(temperature)[t - 1];
        one_pair(in<T>(student) + at, in<T>(teachers) + teacher_at, tau, weight, kind, known, scratch, of,
                 &each[t * rows + row], d_student ? d_student + at : nullptr,
                 d_teachers ? d_teachers + teacher_at : nullptr, n);
        total[row] += weight * each[t * rows + row];
        last = s;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_teacher_kl(Tensor student, Tensor teachers, Tensor weights,
                                                            Tensor temperature, int64_t student_of, int64_t kind,
                                                            bool student_grad, bool teacher_grad) {
  const int64_t rows = teachers.size(1), none[] = {0};
  check_dense({&student, &teachers, &weights, &temperature});
  Tensor loss = torch::stable::new_empty(weights, {rows}), kl = torch::stable::empty_like(weights);
  Tensor d_student = student_grad ? torch::stable::empty_like(student) : torch::stable::new_empty(student, none);
  Tensor d_teachers = teacher_grad ? torch::stable::empty_like(teachers) : torch::stable::new_empty(teachers, none);
  if (student.scalar_type() == ScalarType::Double)
    kl_batch<double>(student, teachers, weights, temperature, student_of, kind, loss, kl, d_student, d_teachers);
  else
    kl_batch<float>(student, teachers, weights, temperature, student_of, kind, loss, kl, d_student, d_teachers);
  return {loss, kl, d_student, d_teachers};
}

template <typename T>
void fold_batch(const Tensor& teachers, const Tensor& weights, const Tensor& temperature, T* mean) {
  const int64_t count = teachers.size(0), rows = teachers.size(1), n = teachers.size(2);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(2, n);
    for (int64_t row = begin; row < end; ++row) {
      std::fill_n(mean + row * n, n, T(0));
      for (int64_t t = 0; t < count; ++t)
        fold_leaf(in<T>(teachers) + (t * rows + row) * n, in<T>(temperature)[t], in<T>(weights)[t * rows + row],
                  scratch.row(0), scratch.row(1), mean + row * n, n);
    }
  });
}

Tensor fold_teachers(Tensor teachers, Tensor weights, Tensor temperature) {
  check_dense({&teachers, &weights, &temperature});
  Tensor mean = torch::stable::new_empty(teachers, {teachers.size(1), teachers.size(2)});
  if (teachers.scalar_type() == ScalarType::Double) fold_batch(teachers, weights, temperature, out<double>(mean));
  else fold_batch(teachers, weights, temperature, out<float>(mean));
  return mean;
}

template <class Library>
void register_distill(Library& m) {
  m.impl("multi_teacher_kl", TORCH_BOX(&multi_teacher_kl));
  m.impl("fold_teachers", TORCH_BOX(&fold_teachers));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm, CPU, m) { register_distill(m); }
STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CPU, m) { register_distill(m); }
