// The common part of the operators on frames, tensors (..., C) whose memory is row-major: checks,
// new tensors and the choice of the kernel for a dtype.
#pragma once

#include "capability.h"
#include "checks.h"
#include "gradients.h"
#include "tasks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace fastguard {

// What a kernel computes in, and the dtype of what belongs to a channel.
inline ScalarType computed_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_shape(const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) {
    return false;
  }
  int64_t dim = 0;
  for (const int64_t size : shape) {
    if (tensor.size(dim++) != size) {
      return false;
    }
  }
  return true;
}

// Raises unless the tensor has this dtype and shape; returns it in row-major memory.
inline torch::stable::Tensor as_rows(
    const char* op,
    const char* name,
    const torch::stable::Tensor& tensor,
    ScalarType dtype,
    std::initializer_list<int64_t> shape) {
  if (tensor.scalar_type() != dtype || !has_shape(tensor, shape)) {
    std::string wanted;
    for (const int64_t size : shape) {
      wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
    }
    STD_TORCH_CHECK(
        false,
        op,
        ": ",
        name,
        " must have shape (",
        wanted,
        ") and dtype number ",
        static_cast<int>(dtype),
        "; got ",
        tensor.dim(),
        " dimensions, ",
        tensor.numel(),
        " elements and dtype number ",
        static_cast<int>(tensor.scalar_type()));
  }
  check_memory(tensor.get(), op, [&] { return name; });
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float16();
  }
}

inline torch::stable::Tensor new_frames(
    const torch::stable::Tensor& like, ScalarType dtype, int64_t batch, int64_t frames, int64_t n) {
  return empty_strided(like, {batch, frames, n}, {frames * n, n, 1}, shim_dtype(dtype));
}

inline torch::stable::Tensor new_vector(
    const torch::stable::Tensor& like, ScalarType dtype, int64_t n) {
  return empty_strided(like, {n}, {1}, shim_dtype(dtype));
}

// Below this a parallel region costs more than it saves.
constexpr int64_t serial_part_elements = 32768;

// Calls work(i) for i from 0 to n - 1; elements: of all tasks together.
template <class Work>
void for_each_part(int64_t n, int64_t elements, const Work& work) {
  for_each_task(
      n, 1, elements > serial_part_elements, [&](int64_t) -> const Work& { return work; });
}

}  // namespace fastguard
