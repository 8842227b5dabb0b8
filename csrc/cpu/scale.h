#pragma once

#include "tensor_list.h"

#include <torch/csrc/stable/tensor.h>

namespace fastguard {

// Multiplies the gradients in place, after a check of clip_coef.
void scale_cpu(const TensorList& grads, const torch::stable::Tensor& clip_coef);

}  // namespace fastguard
