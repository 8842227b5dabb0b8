#pragma once

#include "tensor_list.h"

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fastguard {

// Returns total_norm, norms and nonfinite.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> grad_norm_cpu(
    const TensorList& grads);

}  // namespace fastguard
