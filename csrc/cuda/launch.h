// What csrc/cuda/register.cpp (torch, no CUDA headers) and the .cu files (CUDA, no torch headers) share.
#pragma once

#include <cstdint>

namespace rvlm::cuda {

enum class GradType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A batch of `rows` samples of `n` contiguous elements each. alpha and eps have stride 0 (one for all) or 1.
template <typename T>
struct StepArgs {
  T* out;
  const T* x_adv;
  const void* grad;
  GradType grad_type;
  const T* x;
  const T *alpha, *eps;
  int alpha_stride, eps_stride;
  T lo, hi, levels;
  const bool* active;  // null: all rows
  int64_t rows, n;
};

constexpr int kL2Blocks = 64;  // partial sums per row, at most; `workspace` holds rows * kL2Blocks * 3 doubles

// stream is a cudaStream_t. Each returns cudaGetLastError() as an int.
template <typename T>
int linf_step(const StepArgs<T>& args, void* stream);
template <typename T>
int l2_step(const StepArgs<T>& args, double* workspace, void* stream);
template <typename T>
int uniform_start(T* out, const T* x, const T* eps, int eps_stride, const int64_t* ids, uint64_t seed, uint32_t counter_stream,
                  T lo, T hi, int64_t rows, int64_t n, void* stream);

const char* error_string(int error);

}  // namespace rvlm::cuda
