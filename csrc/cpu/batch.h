// A batch as the CPU's steps see it: rows of n contiguous elements, cut into fixed chunks so that results do not depend on
// the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../checks.h"
#include "../step_math.h"

namespace rvlm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kChunk = 1 << 14;  // elements; a multiple of 4 (one Philox counter) and of the lanes of a sum
constexpr int64_t kGrain = 2;        // chunks a thread takes at least

// With per-row scalars and rows that may be switched off.
template <typename T>
struct Batch {
  T* out;
  const T *x_adv, *x, *alpha, *eps;
  int64_t alpha_stride, eps_stride, rows, n, chunks;
  const bool* active;
  Box<T> box;
};

template <typename T>
Batch<T> make_batch(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
                    const Tensor& eps, double lo, double hi, const std::optional<Tensor>& active, double levels) {
  check_same_layout(x_adv, x, "x");
  check_same_layout(x_adv, grad, "grad");
  check_same_layout(x_adv, out, "out");
  const int64_t rows = x_adv.size(0), n = rows ? x_adv.numel() / rows : 0;
  check_per_row(alpha, rows, "alpha");
  check_per_row(eps, rows, "eps");
  return {static_cast<T*>(out.mutable_data_ptr()),
          static_cast<const T*>(x_adv.const_data_ptr()),
          static_cast<const T*>(x.const_data_ptr()),
          static_cast<const T*>(alpha.const_data_ptr()),
          static_cast<const T*>(eps.const_data_ptr()),
          alpha.numel() > 1,
          eps.numel() > 1,
          rows,
          n,
          (n + kChunk - 1) / kChunk,
          active_rows(active, rows),
          {T(lo), T(hi), T(levels)}};
}

// Calls body(row, offset into memory, length) for every chunk of every active row; inactive rows are copied.
template <typename T, class Body>
void for_chunks(const Batch<T>& b, const Body& body) {
  torch::stable::parallel_for(0, b.rows * b.chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t row = job / b.chunks, start = (job % b.chunks) * kChunk;
      const int64_t offset = row * b.n + start, length = std::min(kChunk, b.n - start);
      if (b.active && !b.active[row]) {
        if (b.out != b.x_adv) std::memcpy(b.out + offset, b.x_adv + offset, length * sizeof(T));
      } else {
        body(row, offset, length);
      }
    }
  });
}

// Calls f(T{}, G{}) with the types of images and gradient.
template <class F>
void with_types(const Tensor& x, const Tensor& grad, const F& f) {
  const auto pixels = x.scalar_type(), slopes = grad.scalar_type();
  if (pixels == ScalarType::Double && slopes == ScalarType::Double) return f(double{}, double{});
  STD_TORCH_CHECK(pixels == ScalarType::Float, "images must be float32, or float64 with float64 gradients");
  if (slopes == ScalarType::Float) f(float{}, float{});
  else if (slopes == ScalarType::BFloat16) f(float{}, BFloat16{});
  else if (slopes == ScalarType::Half) f(float{}, Half{});
  else STD_TORCH_CHECK(false, "the gradient of float32 images must be float32, bfloat16 or float16");
}

}  // namespace rvlm
