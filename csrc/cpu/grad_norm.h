#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace fastguard {

// Returns total_norm, norms and nonfinite.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> grad_norm_cpu(
    const std::vector<torch::stable::Tensor>& grads);

}  // namespace fastguard
