// grad_norm_decide_: measures gradients, decides about them and updates a GradScaler.
// Reference: grad_norm_decide_ref_ in fastguard/ops/grad_norm_decide.py.

#include "checks.h"
#include "decide.h"
#include "decisions.h"
#include "grad_norm.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace fastguard {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grad_norm_decide_cpu(
    StableListHandle list,
    const std::optional<Tensor>& unscale,
    const std::optional<Tensor>& loss,
    Tensor statistics,
    Tensor seen_norms,
    Tensor accepted_norms,
    Tensor per_tensor,
    int64_t step,
    int64_t threshold,
    double max_norm,
    double skip_norm,
    const std::vector<double>& options,
    const std::optional<Tensor>& scale,
    const std::optional<Tensor>& growth_tracker,
    const std::vector<double>& growth) {
  constexpr const char* op = "grad_norm_decide_";
  const TensorList grads(list);
  const int64_t n = static_cast<int64_t>(grads.size());
  check_guard_decide(
      op, n, unscale, loss, statistics, seen_norms, accepted_norms, per_tensor, threshold, options);
  check_growth(op, scale, growth_tracker, growth);
  const auto [total_norm, norms, nonfinite] = grad_norm_cpu(grads);
  const auto [grad_coef, verdict, record] = guard_decide_cpu(
      total_norm,
      norms,
      unscale,
      loss,
      statistics,
      seen_norms,
      accepted_norms,
      per_tensor,
      step,
      threshold,
      max_norm,
      skip_norm,
      options);
  if (scale.has_value()) {
    const bool found_inf = !std::isfinite(*total_norm.const_data_ptr<double>());
    grow(
        growth_of(growth),
        found_inf,
        *scale->mutable_data_ptr<float>(),
        *growth_tracker->mutable_data_ptr<int32_t>());
  }
  return {total_norm, norms, nonfinite, grad_coef, verdict, record};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("grad_norm_decide_", TORCH_BOX(&fastguard::grad_norm_decide_cpu));
}
