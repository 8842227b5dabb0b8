#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastguard {

// Multiplies the gradients in place; clip_coef is checked.
void scale_cpu(
    const std::vector<torch::stable::Tensor>& grads, const torch::stable::Tensor& clip_coef);

}  // namespace fastguard
