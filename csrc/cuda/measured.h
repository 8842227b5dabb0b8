// A launch of grad_norm's kernel, and its results.
#pragma once

#include "cuda/judge.cuh"
#include "cuda/launch.h"
#include "cuda/measure.cuh"

#include <vector>

namespace fastguard {

struct Measured {
  explicit Measured(const Stream& on, int64_t n)
      : total_norm(on.empty({}, torch::headeronly::ScalarType::Double)),
        norms(on.empty({n}, torch::headeronly::ScalarType::Double)),
        nonfinite(on.empty({n, 3}, torch::headeronly::ScalarType::Long)) {}

  Norms out() const {
    return {
        total_norm.mutable_data_ptr<double>(),
        norms.mutable_data_ptr<double>(),
        nonfinite.mutable_data_ptr<int64_t>()};
  }

  torch::stable::Tensor total_norm, norms, nonfinite;
};

// `deciding`: the decision that the kernel makes, or Deciding{} for none. Errors name `op`.
Measured measure(
    const Stream& on,
    const std::vector<torch::stable::Tensor>& grads,
    const char* op,
    const Deciding& deciding);

}  // namespace fastguard
