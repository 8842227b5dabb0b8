// The arguments and results of a decision, in the form that decide.cuh takes.
#pragma once

#include "checks.h"
#include "cuda/judge.cuh"
#include "cuda/launch.h"

#include <optional>

namespace fastguard {

struct Decided {
  Decided(const Stream& on, int64_t threshold, int64_t tensors)
      : grad_coef(on.empty(
            static_cast<Threshold>(threshold) == Threshold::adagc ? std::vector<int64_t>{tensors}
                                                                  : std::vector<int64_t>{},
            torch::headeronly::ScalarType::Double)),
        verdict(on.empty({}, torch::headeronly::ScalarType::Long)),
        record(on.empty({record_entries}, torch::headeronly::ScalarType::Double)) {}

  torch::stable::Tensor grad_coef, verdict, record;
};

template <class T>
T* data_or_null(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? tensor->mutable_data_ptr<T>() : nullptr;
}

// check_guard_decide and check_growth have checked everything else before.
inline Deciding deciding_of(
    const Stream& on,
    const char* op,
    const std::optional<torch::stable::Tensor>& unscale,
    const std::optional<torch::stable::Tensor>& loss,
    const torch::stable::Tensor& statistics,
    const torch::stable::Tensor& seen_norms,
    const torch::stable::Tensor& accepted_norms,
    const torch::stable::Tensor& per_tensor,
    int64_t step,
    const Policy& policy,
    const std::optional<torch::stable::Tensor>& scale,
    const std::optional<torch::stable::Tensor>& growth_tracker,
    const Growth& growth,
    const Decided& decided) {
  check_on(on, unscale, op, "unscale");
  check_on(on, loss, op, "loss");
  check_on(on, statistics, op, "statistics");
  check_on(on, seen_norms, op, "seen_norms");
  check_on(on, accepted_norms, op, "accepted_norms");
  check_on(on, per_tensor, op, "per_tensor");
  check_on(on, scale, op, "scale");
  check_on(on, growth_tracker, op, "growth_tracker");
  return {
      policy,
      unscale.has_value() ? unscale->const_data_ptr<double>() : nullptr,
      loss.has_value() ? loss->const_data_ptr<double>() : nullptr,
      statistics.mutable_data_ptr<double>(),
      seen_norms.mutable_data_ptr<double>(),
      accepted_norms.mutable_data_ptr<double>(),
      seen_norms.numel(),
      per_tensor.mutable_data_ptr<double>(),
      per_tensor.size(1),
      static_cast<double>(step),
      data_or_null<float>(scale),
      data_or_null<int32_t>(growth_tracker),
      growth,
      decided.grad_coef.mutable_data_ptr<double>(),
      decided.verdict.mutable_data_ptr<int64_t>(),
      decided.record.mutable_data_ptr<double>()};
}

}  // namespace fastguard
