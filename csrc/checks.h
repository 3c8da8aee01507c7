// What the C++ backends check for themselves: that memory may be walked linearly. Types, shapes and values are checked
// in Python (rvlm/ops), where the messages are.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

namespace rvlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_same_layout(const Tensor& a, const Tensor& b, const char* name) {
  STD_TORCH_CHECK(a.dim() == b.dim(), name, " must have ", a.dim(), " dimensions, got ", b.dim());
  for (int64_t i = 0; i < a.dim(); ++i) {
    STD_TORCH_CHECK(a.size(i) == b.size(i), name, " must have size ", a.size(i), " in dimension ", i, ", got ", b.size(i));
    STD_TORCH_CHECK(a.size(i) == 1 || a.stride(i) == b.stride(i), name, " must have stride ", a.stride(i),
                    " in dimension ", i, ", got ", b.stride(i), ": call rvlm.ops, which arranges this");
  }
}

inline void check_dense(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == (*tensors.begin())->scalar_type(),
                    "expected contiguous tensors of one type: call rvlm.ops, which arranges this");
}

// Typed memory of a tensor; null where a result has no elements, which means that it was not asked for.
template <typename T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

inline void check_per_row(const Tensor& t, int64_t rows, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && (t.numel() == 1 || t.numel() == rows), name, " must have 1 or ", rows,
                  " elements, got ", t.numel());
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous: call rvlm.ops, which arranges this");
}

// bool [B], or null where every row is active.
inline const bool* active_rows(const std::optional<Tensor>& active, int64_t rows) {
  if (!active) return nullptr;
  STD_TORCH_CHECK(active->scalar_type() == ScalarType::Bool && active->numel() == rows && active->is_contiguous(),
                  "active must be bool [", rows, "], contiguous");
  return static_cast<const bool*>(active->const_data_ptr());
}

}  // namespace rvlm
