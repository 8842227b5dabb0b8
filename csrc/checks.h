// Argument checks shared by the CPU and CUDA kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace fastguard {

inline void check_total_norm(const torch::stable::Tensor& total_norm) {
  STD_TORCH_CHECK(
      total_norm.dim() == 0 &&
          total_norm.scalar_type() == torch::headeronly::ScalarType::Double,
      "decide: total_norm must be a float64 tensor of shape (), as grad_norm returns it; got ",
      total_norm.dim(),
      " dimensions and dtype number ",
      static_cast<int>(total_norm.scalar_type()));
}

}  // namespace fastguard
