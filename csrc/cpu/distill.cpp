// Divergences between students and teachers on the CPU: one thread per sample, rows of logits in the cache.
// The specification is the eager reference in rvlm/ops/distill.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "vector_math.h"

namespace {

using namespace rvlm;

constexpr int64_t kForward = 0, kReverse = 1;

// What turns scaled = z / tau and powers = exp(scaled - shift) into log softmax and softmax.
template <typename T>
struct Scale {
  T shift, norm, factor;
};

template <typename T>
RVLM_INLINE Scale<T> powers_loop(const T* __restrict z, T tau, T* __restrict scaled, T* __restrict powers, int64_t n) {
  T high = -kInf<T>, total = T(0);
#pragma omp simd reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    scaled[i] = z[i] / tau;
    high = scaled[i] > high ? scaled[i] : high;
  }
  const T shift = high == -kInf<T> ? T(0) : high == kInf<T> ? std::numeric_limits<T>::quiet_NaN() : high;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    powers[i] = exp_(scaled[i] - shift);
    total += powers[i];
  }
  return {shift, std::log(total), T(1) / total};
}

// log softmax(z / tau) and its exponential; returns how many classes are masked by -inf.
template <typename T>
RVLM_INLINE int64_t softmax_loop(const T* __restrict z, T tau, T* __restrict log_p, T* __restrict p, int64_t n) {
  const Scale<T> by = powers_loop(z, tau, log_p, p, n);
  int64_t masked = 0;
#pragma omp simd reduction(+ : masked)
  for (int64_t i = 0; i < n; ++i) {
    log_p[i] = (log_p[i] - by.shift) - by.norm;
    p[i] *= by.factor;
    masked += log_p[i] == -kInf<T>;
  }
  return masked;
}

// KL(teacher || student) where the student masks nothing, and scale times its gradient added to d, in three passes over
// the teacher's row.
template <typename T>
RVLM_INLINE T forward_loop(const T* __restrict teacher, T tau, const T* __restrict log_q, const T* __restrict q, T scale,
                           T* __restrict scaled, T* __restrict powers, T* __restrict d, int64_t n) {
  const Scale<T> by = powers_loop(teacher, tau, scaled, powers, n);
  T sum = T(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T p = powers[i] * by.factor, difference = ((scaled[i] - by.shift) - by.norm) - log_q[i];
    sum += p == T(0) ? T(0) : p * difference;
    d[i] += scale * (q[i] - p);
  }
  return sum;
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
  RVLM_CLONES int64_t softmax_leaf(const T* z, T tau, T* log_p, T* p, int64_t n) {                                     \
    return softmax_loop(z, tau, log_p, p, n);                                                                          \
  }                                                                                                                    \
  RVLM_CLONES T forward_leaf(const T* teacher, T tau, const T* log_q, const T* q, T scale, T* scaled, T* powers, T* d, \
                             int64_t n) {                                                                              \
    return forward_loop(teacher, tau, log_q, q, scale, scaled, powers, d, n);                                          \
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

// Everything of one teacher and one row; scratch holds five rows, the first two of which, and how many classes the
// student masks, may be known already.
template <typename T>
void one_pair(const T* student, const T* teacher, T tau, T weight, int64_t kind, bool known, T* scratch, int64_t* masked,
              T* kl, T* d_student, T* d_teacher, int64_t n) {
  T *log_q = scratch, *q = log_q + n, *log_p = q + n, *p = log_p + n, *log_m = p + n;
  const T scale = weight / tau;
  if (!known) *masked = softmax_leaf(student, tau, log_q, q, n);
  if (kind == kForward && d_student && !d_teacher && !*masked) {
    *kl = forward_leaf(teacher, tau, log_q, q, scale, log_p, p, d_student, n);
    return;
  }
  softmax_leaf(teacher, tau, log_p, p, n);
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
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(5 * n);
    int64_t masked = 0;
    for (int64_t row = begin; row < end; ++row) {
      total[row] = T(0);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t of = student_of >> (4 * t) & 15, at = (of * rows + row) * n, teacher_at = (t * rows + row) * n;
        const T weight = in<T>(weights)[t * rows + row], tau = in<T>(temperature)[t];
        const bool known = t > 0 && of == (student_of >> (4 * (t - 1)) & 15) && tau == in<T>(temperature)[t - 1];
        one_pair(in<T>(student) + at, in<T>(teachers) + teacher_at, tau, weight, kind, known, scratch.data(), &masked,
                 &each[t * rows + row], d_student ? d_student + at : nullptr,
                 d_teachers ? d_teachers + teacher_at : nullptr, n);
        total[row] += weight * each[t * rows + row];
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
  if (student_grad) torch::stable::zero_(d_student);
  if (teacher_grad) torch::stable::zero_(d_teachers);
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
    std::vector<T> scratch(2 * n);
    T *log_p = scratch.data(), *p = log_p + n;
    for (int64_t row = begin; row < end; ++row) {
      T* to = mean + row * n;
      for (int64_t i = 0; i < n; ++i) to[i] = T(0);
      for (int64_t t = 0; t < count; ++t) {
        softmax_leaf(in<T>(teachers) + (t * rows + row) * n, in<T>(temperature)[t], log_p, p, n);
        const T weight = in<T>(weights)[t * rows + row];
        for (int64_t i = 0; i < n; ++i) to[i] += weight * p[i];
      }
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
