#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastguard {

// Multiplies the gradients in place, after a check of clip_coef.
void scale_cpu(
    const std::vector<torch::stable::Tensor>& grads, const torch::stable::Tensor& clip_coef);

}  // namespace fastguard
