// What csrc/cuda/register.cpp (torch, no CUDA headers) and the .cu files (CUDA, no torch headers) share.
#pragma once

#include <cstdint>

namespace rvlm::cuda {

enum class DataType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A batch of `rows` samples of `n` contiguous elements each. alpha and eps have stride 0 (one for all) or 1.
template <typename T>
struct StepArgs {
  T* out;
  const T* x_adv;
  const void* grad;
  DataType grad_type;
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

// A residual stream [batch, n, d] of the type `stream`; everything else has type T, the type that is computed in.
template <typename T>
struct Stream {
  DataType type;
  int64_t batch, n, d;
  const T* weight;  // [d], of the LayerNorm
};

constexpr int kAnchorParts = 64;  // parts that the batch is cut into for sums over it, at most

template <typename T>
int anchored_residual(const Stream<T>& s, const void* x0, const void* o, const T* anchor, const T* mix, const T* bias, T eps,
                      void* x1, void* y, T* mean, T* rstd, void* stream);

// Gradients that are null are not computed; o may be null where of_o is. The workspace holds, for each of `parts` parts of
// the batch and each token, d elements for total, d each for d_weight and d_bias, and 1 for of_o.
template <typename T>
int anchored_residual_backward(const Stream<T>& s, const void* of_x1, const void* of_y, const void* x1, const void* o,
                               const T* mean, const T* rstd, void* g, T* total, T* of_o, T* d_weight, T* d_bias, int parts,
                               T* workspace, void* stream);

const char* error_string(int error);

}  // namespace rvlm::cuda
