// Glue between torch's stable ABI and the torch-free launchers: registers CUDA kernels of the rvlm_cpp namespace.
// `rvlm::` on CUDA belongs to Triton; use_backend("cpp") comes here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "launch.h"

namespace {

using namespace rvlm;
using rvlm::cuda::GradType;
using rvlm::cuda::StepArgs;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "rvlm_cpp::", op, " failed to launch: ", cuda::error_string(error));
}

GradType grad_type(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case ScalarType::Float: return GradType::kFloat32;
    case ScalarType::BFloat16: return GradType::kBFloat16;
    case ScalarType::Half: return GradType::kFloat16;
    case ScalarType::Double: return GradType::kFloat64;
    default: STD_TORCH_CHECK(false, "grad must be float32, bfloat16, float16 or float64");
  }
}

template <typename T>
StepArgs<T> make_args(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
                      const Tensor& eps, double lo, double hi, const std::optional<Tensor>& active, double levels) {
  check_same_layout(x_adv, x, "x");
  check_same_layout(x_adv, grad, "grad");
  check_same_layout(x_adv, out, "out");
  const int64_t rows = x_adv.size(0);
  check_per_row(alpha, rows, "alpha");
  check_per_row(eps, rows, "eps");
  const GradType type = grad_type(grad);
  STD_TORCH_CHECK((sizeof(T) == 8) == (type == GradType::kFloat64), "float64 images and gradients go together");
  return {static_cast<T*>(out.mutable_data_ptr()),
          static_cast<const T*>(x_adv.const_data_ptr()),
          grad.const_data_ptr(),
          type,
          static_cast<const T*>(x.const_data_ptr()),
          static_cast<const T*>(alpha.const_data_ptr()),
          static_cast<const T*>(eps.const_data_ptr()),
          alpha.numel() > 1,
          eps.numel() > 1,
          T(lo),
          T(hi),
          T(levels),
          active_rows(active, rows),
          rows,
          rows ? x_adv.numel() / rows : 0};
}

// Runs f<T>() with the image type of x.
template <class F>
void with_image_type(const Tensor& x, const F& f) {
  const auto type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "images must be float32 or float64");
  type == ScalarType::Double ? f(double{}) : f(float{});
}

void linf_into(Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Tensor& alpha,
               const Tensor& eps, double lo, double hi, const std::optional<Tensor>& active, double levels) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_image_type(x, [&](auto t) {
    const auto args = make_args<decltype(t)>(out, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
    check_launch(cuda::linf_step(args, current_stream(x)), "linf_step");
  });
}

void linf_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
                std::optional<Tensor> active, double levels) {
  linf_into(x_adv, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
}

Tensor linf_step(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
                 std::optional<Tensor> active, double levels) {
  Tensor out = torch::stable::empty_like(x_adv);
  linf_into(out, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
  return out;
}

void l2_step_(Tensor x_adv, Tensor grad, Tensor x, Tensor alpha, Tensor eps, double lo, double hi,
              std::optional<Tensor> active, double levels) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor workspace = torch::stable::new_empty(x, {x.size(0) * cuda::kL2Blocks * 3}, ScalarType::Double);
  with_image_type(x, [&](auto t) {
    const auto args = make_args<decltype(t)>(x_adv, x_adv, grad, x, alpha, eps, lo, hi, active, levels);
    check_launch(cuda::l2_step(args, static_cast<double*>(workspace.mutable_data_ptr()), current_stream(x)), "l2_step_");
  });
}

Tensor uniform_start(Tensor x, Tensor eps, Tensor sample_ids, int64_t seed, double lo, double hi, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous: noise is numbered by pixel, not by address");
  const int64_t rows = x.size(0);
  check_per_row(eps, rows, "eps");
  STD_TORCH_CHECK(sample_ids.numel() == rows, "sample_ids must have ", rows, " elements, got ", sample_ids.numel());
  Tensor out = torch::stable::empty_like(x);
  with_image_type(x, [&](auto t) {
    using T = decltype(t);
    const int error = cuda::uniform_start(
        static_cast<T*>(out.mutable_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
        static_cast<const T*>(eps.const_data_ptr()), eps.numel() > 1, static_cast<const int64_t*>(sample_ids.const_data_ptr()),
        uint64_t(seed), uint32_t(stream), T(lo), T(hi), rows, rows ? x.numel() / rows : 0, current_stream(x));
    check_launch(error, "uniform_start");
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CUDA, m) {
  m.impl("linf_step_", TORCH_BOX(&linf_step_));
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("l2_step_", TORCH_BOX(&l2_step_));
  m.impl("uniform_start", TORCH_BOX(&uniform_start));
}
