// Glue between torch's stable ABI and the torch-free launchers: registers CUDA kernels of the rvlm_cpp namespace.
// `rvlm::` on CUDA belongs to Triton; use_backend("cpp") comes here.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <tuple>

#include "../checks.h"
#include "launch.h"

namespace {

using namespace rvlm;
using rvlm::cuda::DataType;
using rvlm::cuda::StepArgs;

void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "rvlm_cpp::", op, " failed to launch: ", cuda::error_string(error));
}

DataType data_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    case ScalarType::Double: return DataType::kFloat64;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
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
  const DataType type = data_type(grad);
  STD_TORCH_CHECK((sizeof(T) == 8) == (type == DataType::kFloat64), "float64 images and gradients go together");
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
  STD_TORCH_CHECK(sample_ids.numel() == rows && sample_ids.is_contiguous(), "sample_ids must have ", rows,
                  " elements, contiguous, got ", sample_ids.numel());
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

template <typename T>
cuda::Stream<T> stream_of(const Tensor& x, const Tensor& weight) {
  return {data_type(x), x.size(0), x.size(1), x.size(2), in<T>(weight)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> anchored_residual(Tensor x0, Tensor o, Tensor anchor, Tensor mix,
                                                             Tensor weight, Tensor bias, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  check_dense({&x0, &o});
  check_dense({&anchor, &mix, &weight, &bias});
  Tensor x1 = torch::stable::empty_like(x0), y = torch::stable::empty_like(x0);
  Tensor mean = torch::stable::new_empty(anchor, {x0.size(0), x0.size(1)}), rstd = torch::stable::empty_like(mean);
  with_image_type(anchor, [&](auto t) {
    using T = decltype(t);
    const int error = cuda::anchored_residual<T>(stream_of<T>(x0, weight), x0.const_data_ptr(), o.const_data_ptr(), in<T>(anchor),
                                                 in<T>(mix), in<T>(bias), T(eps), x1.mutable_data_ptr(),
                                                 y.mutable_data_ptr(), out<T>(mean), out<T>(rstd), current_stream(x0));
    check_launch(error, "anchored_residual");
  });
  return {x1, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> anchored_residual_backward(Tensor of_x1, Tensor of_y, Tensor x1,
                                                                              std::optional<Tensor> o, Tensor mean,
                                                                              Tensor rstd, Tensor weight,
                                                                              bool anchor_grad, bool norm_grad) {
  const torch::stable::accelerator::DeviceGuard guard(x1.get_device_index());
  check_dense({&of_x1, &of_y, &x1, o ? &*o : &x1});
  check_dense({&mean, &rstd, &weight});
  const int64_t batch = x1.size(0), n = x1.size(1), d = x1.size(2);
  const auto make = [&](bool wanted, int64_t size) { return torch::stable::new_empty(mean, {wanted ? size : 0}); };
  Tensor g = torch::stable::empty_like(x1), of_o = make(o.has_value(), 1);
  Tensor total = anchor_grad ? torch::stable::new_empty(mean, {n, d}) : make(false, 0);
  Tensor d_weight = make(norm_grad, d), d_bias = make(norm_grad, d);
  const int64_t enough = (1024 + n - 1) / (n ? n : 1);  // blocks to fill a GPU where the tokens alone do not
  const int parts = int(std::max<int64_t>(1, std::min({batch, enough, int64_t(cuda::kAnchorParts)})));
  const Tensor workspace = torch::stable::new_empty(mean, {parts * n * (3 * d + 1)});
  with_image_type(mean, [&](auto t) {
    using T = decltype(t);
    const int error = cuda::anchored_residual_backward<T>(
        stream_of<T>(x1, weight), of_x1.const_data_ptr(), of_y.const_data_ptr(), x1.const_data_ptr(),
        o ? o->const_data_ptr() : nullptr, in<T>(mean), in<T>(rstd), g.mutable_data_ptr(), out<T>(total), out<T>(of_o),
        out<T>(d_weight), out<T>(d_bias), parts, static_cast<T*>(workspace.mutable_data_ptr()), current_stream(x1));
    check_launch(error, "anchored_residual_backward");
  });
  return {g, total, of_o, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rvlm_cpp, CUDA, m) {
  m.impl("anchored_residual", TORCH_BOX(&anchored_residual));
  m.impl("anchored_residual_backward", TORCH_BOX(&anchored_residual_backward));
  m.impl("linf_step_", TORCH_BOX(&linf_step_));
  m.impl("linf_step", TORCH_BOX(&linf_step));
  m.impl("l2_step_", TORCH_BOX(&l2_step_));
  m.impl("uniform_start", TORCH_BOX(&uniform_start));
}
