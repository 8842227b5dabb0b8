// The decision's functions that several operators of the CPU call.
#pragma once

#include "decide.h"

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastguard {

// Returns clip_coef and verdict.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> tensors_of(const Decision& decision);

// Returns grad_coef, verdict and record.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> guard_decide_cpu(
    const torch::stable::Tensor& total_norm,
    const torch::stable::Tensor& norms,
    const std::optional<torch::stable::Tensor>& unscale,
    const std::optional<torch::stable::Tensor>& loss,
    torch::stable::Tensor statistics,
    torch::stable::Tensor seen_norms,
    torch::stable::Tensor accepted_norms,
    torch::stable::Tensor per_tensor,
    int64_t step,
    int64_t threshold,
    double max_norm,
    double skip_norm,
    const std::vector<double>& options);

}  // namespace fastguard
