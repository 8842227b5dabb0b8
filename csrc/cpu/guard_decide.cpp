// guard_decide_: verdict, coefficient and the statistics that the next decision rests on;
// grad_norm_decide_: the same about gradients that it measures.
// The policy itself is in csrc/decide.h, for every device.

#include "checks.h"
#include "decide.h"
#include "grad_norm.h"

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

// 0 where there are none.
double norm_at(const double* norms, int64_t size, const Place& place) {
  std::vector<double> ascending(norms, norms + size);
  if (size == 0) {
    return 0.0;
  }
  std::sort(ascending.begin(), ascending.end(), less);
  return place.between(ascending[place.below], ascending[place.above]);
}

// The last norms, as in the tensors that hold them.
struct Windows {
  double* seen;
  double* accepted;
  int64_t size;
};

Quantiles quantiles_of(const Policy& policy, const Statistics& known, const Windows& windows) {
  const int64_t seen = needs_seen(policy) ? held(known.seen, windows.size) : 0;
  const int64_t accepted = needs_accepted(policy) ? held(known.accepted, windows.size) : 0;
  return {
      norm_at(windows.seen, seen, Place::of_median_with_a_larger(seen)),
      norm_at(windows.accepted, accepted, Place::of_quantile(accepted_quantile(policy), accepted))};
}

void learn(
    const Policy& policy,
    const Judgement& judged,
    const Windows& windows,
    Statistics known,
    double* statistics) {
  if (!judged.says) {
    return;
  }
  windows.seen[next_place(known.seen, windows.size)] = judged.norm;
  statistics[0] = known.seen + 1.0;
  if (judged.skipped()) {
    return;
  }
  windows.accepted[next_place(known.accepted, windows.size)] = judged.norm;
  absorb(policy, known, judged.norm, judged.adaptive);
  statistics[1] = known.accepted;
  statistics[2] = known.mean;
  statistics[3] = known.variance;
}

// The columns of the tensor that remembers each tensor's norms; none where it has no columns.
struct Columns {
  double* data;
  int64_t n;

  TensorStatistics at(int64_t i) const {
    return n == 0 ? TensorStatistics{INFINITY, -1.0, INFINITY, -1.0}
                  : TensorStatistics{data[i], data[n + i], data[2 * n + i], data[3 * n + i]};
  }
  void set(int64_t i, const TensorStatistics& known) const {
    data[i] = known.ema;
    data[n + i] = known.clipped_since;
    data[2 * n + i] = known.usual;
    data[3 * n + i] = known.risen_since;
  }
};

std::tuple<Tensor, Tensor, Tensor> guard_decide_cpu(
    const Tensor& total_norm,
    const Tensor& norms,
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
    const std::vector<double>& options) {
  check_measured("guard_decide_", total_norm, norms);
  check_guard_decide(
      "guard_decide_",
      norms.numel(),
      unscale,
      loss,
      statistics,
      seen_norms,
      accepted_norms,
      per_tensor,
      threshold,
      options);
  const Policy policy = policy_of(threshold, max_norm, skip_norm, options);
  double* const numbers = statistics.mutable_data_ptr<double>();
  Statistics known = {numbers[0], numbers[1], numbers[2], numbers[3]};
  const Windows windows = {
      seen_norms.mutable_data_ptr<double>(),
      accepted_norms.mutable_data_ptr<double>(),
      seen_norms.numel()};
  const double known_loss = value_or(loss, 0.0);
  Judgement judged = judge(
      policy,
      known,
      quantiles_of(policy, known, windows),
      *total_norm.const_data_ptr<double>(),
      value_or(unscale, 1.0),
      std::isfinite(known_loss));
  const bool adagc = policy.threshold == Threshold::adagc;
  const double now = static_cast<double>(step);
  Tensor grad_coef = torch::stable::empty(
      adagc ? std::vector<int64_t>{norms.numel()} : std::vector<int64_t>{}, ScalarType::Double);
  double* const coefs = grad_coef.mutable_data_ptr<double>();
  std::fill_n(coefs, grad_coef.numel(), judged.global_coef);
  const double* const each = norms.const_data_ptr<double>();
  const Columns columns = {per_tensor.mutable_data_ptr<double>(), per_tensor.size(1)};
  if (adagc && !judged.skipped()) {
    double applied = 0.0;
    for (int64_t i = 0; i < norms.numel(); ++i) {
      const double norm = each[i] * judged.factor;
      coefs[i] = adagc_coef(policy, judged.warm, norm, judged.global_coef, now, columns.at(i));
      applied = std::max(applied, norm * coefs[i]);
    }
    weigh(judged, smallest(coefs, norms.numel()), applied);
  }
  veto(judged);
  for (int64_t i = 0; i < columns.n; ++i) {
    TensorStatistics of_tensor = columns.at(i);
    remember(policy, judged, each[i] * judged.factor, coefs[adagc ? i : 0], now, of_tensor);
    columns.set(i, of_tensor);
  }
  learn(policy, judged, windows, known, numbers);
  std::for_each(
      coefs, coefs + grad_coef.numel(), [&](double& coef) { coef = judged.grad_coef(coef); });
  Tensor verdict = torch::stable::empty({}, ScalarType::Long);
  *verdict.mutable_data_ptr<int64_t>() = static_cast<int64_t>(judged.decision.verdict);
  Tensor record = torch::stable::empty({6}, ScalarType::Double);
  double* const entry = record.mutable_data_ptr<double>();
  entry[0] = static_cast<double>(judged.decision.verdict);
  entry[1] = judged.decision.clip_coef;
  entry[2] = judged.norm;
  entry[3] = judged.limit;
  entry[4] = value_or(loss, NAN);
  entry[5] = judged.outlier_above;
  return {grad_coef, verdict, record};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grad_norm_decide_cpu(
    const std::vector<Tensor>& grads,
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
  m.impl("guard_decide_", TORCH_BOX(&fastguard::guard_decide_cpu));
  m.impl("grad_norm_decide_", TORCH_BOX(&fastguard::grad_norm_decide_cpu));
}
