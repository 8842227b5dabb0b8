// guard_decide_: verdict, coefficient and the statistics that the next decision rests on.
// The policy itself is in csrc/decide.h, for every device.

#include "checks.h"
#include "decide.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

double value_or(const std::optional<Tensor>& scalar, double otherwise) {
  return scalar.has_value() ? *scalar->const_data_ptr<double>() : otherwise;
}

double smallest(const double* values, int64_t n) {
  return n == 0 ? 1.0 : *std::min_element(values, values + n);
}

std::tuple<Tensor, Tensor, Tensor> guard_decide_cpu(
    const Tensor& total_norm,
    const Tensor& norms,
    const std::optional<Tensor>& unscale,
    const std::optional<Tensor>& loss,
    Tensor statistics,
    Tensor history,
    Tensor ema_norms,
    int64_t threshold,
    double max_norm,
    double skip_norm,
    const std::vector<double>& options,
    bool accept) {
  check_guard_decide(total_norm, norms, unscale, loss, statistics, history, ema_norms, threshold, options);
  const Policy policy{
      static_cast<Threshold>(threshold), max_norm, skip_norm, options[0], options[1], options[2]};
  auto& known = *reinterpret_cast<Statistics*>(statistics.mutable_data_ptr<double>());
  double* const accepted_norms = history.mutable_data_ptr<double>();
  const int64_t window = history.numel();

  std::vector<double> ascending(
      accepted_norms, accepted_norms + std::min(window, static_cast<int64_t>(known.accepted)));
  std::sort(ascending.begin(), ascending.end());
  const Sorted sorted{ascending.data(), static_cast<int64_t>(ascending.size())};

  const double factor = value_or(unscale, 1.0);
  const double norm = *total_norm.const_data_ptr<double>() * factor;
  const double adaptive = adaptive_limit(policy, known, sorted, norm);
  const bool per_tensor = policy.threshold == Threshold::adagc;
  const bool warm = known.accepted >= policy.warmup;
  const double limit = per_tensor && warm ? INFINITY : std::min(max_norm, adaptive);
  const double skip_above = armed(known, sorted, skip_norm) ? skip_norm : INFINITY;
  Decision decision = decide(std::isfinite(value_or(loss, 0.0)) ? norm : NAN, limit, skip_above);
  Tensor grad_coef = torch::stable::empty(
      per_tensor ? std::vector<int64_t>{norms.numel()} : std::vector<int64_t>{}, ScalarType::Double);
  double* const coefs = grad_coef.mutable_data_ptr<double>();
  std::fill_n(coefs, grad_coef.numel(), decision.clip_coef);
  const double* const each = norms.const_data_ptr<double>();
  double* const ema = ema_norms.mutable_data_ptr<double>();
  const double global_coef = decision.clip_coef;
  double applied = norm * decision.clip_coef;
  if (per_tensor && !skips(static_cast<int64_t>(decision.verdict))) {
    applied = 0.0;
    for (int64_t i = 0; i < norms.numel(); ++i) {
      coefs[i] = adagc_coef(policy, warm, each[i] * factor, global_coef, ema[i], false);
      applied = std::max(applied, each[i] * factor * coefs[i]);
    }
    decision.clip_coef = smallest(coefs, norms.numel());
    decision.verdict = decision.clip_coef < 1.0 ? Verdict::clip : Verdict::apply;
  }
  if (applied > largest_applied && !skips(static_cast<int64_t>(decision.verdict))) {
    decision = {1.0, Verdict::skip_outlier};
    std::fill_n(coefs, grad_coef.numel(), 1.0);
  }
  if (accept && !skips(static_cast<int64_t>(decision.verdict))) {
    for (int64_t i = 0; per_tensor && i < norms.numel(); ++i) {
      adagc_coef(policy, warm, each[i] * factor, global_coef, ema[i], true);
    }
    absorb(policy, known, accepted_norms, window, norm, adaptive);
  }
  if (!skips(static_cast<int64_t>(decision.verdict))) {
    std::for_each(coefs, coefs + grad_coef.numel(), [&](double& coef) { coef *= factor; });
  }
  Tensor verdict = torch::stable::empty({}, ScalarType::Long);
  *verdict.mutable_data_ptr<int64_t>() = static_cast<int64_t>(decision.verdict);
  Tensor record = torch::stable::empty({5}, ScalarType::Double);
  double* const entry = record.mutable_data_ptr<double>();
  entry[0] = static_cast<double>(decision.verdict);
  entry[1] = decision.clip_coef;
  entry[2] = norm;
  entry[3] = limit;
  entry[4] = value_or(loss, NAN);
  return {grad_coef, verdict, record};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("guard_decide_", TORCH_BOX(&fastguard::guard_decide_cpu));
}
