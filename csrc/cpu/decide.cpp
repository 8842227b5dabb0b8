// decide: verdict and coefficient. guard_decide_: the same with statistics, which it updates for
// the next decision. The policy itself is in csrc/decide.h, for every device. References:
// decide_ref and guard_decide_ref_ in fastguard/ops/decide.py.

#include "decide.h"

#include "checks.h"
#include "decisions.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
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

// The norm at a place in ascending order; 0 without norms.
double norm_at(const double* norms, int64_t size, const Rank& place) {
  std::vector<double> ascending(norms, norms + size);
  if (size == 0) {
    return 0.0;
  }
  std::sort(ascending.begin(), ascending.end(), less);
  return place.between(ascending[place.below], ascending[place.above]);
}

// The tensors of the last norms.
struct Windows {
  double* seen;
  double* accepted;
  int64_t size;
};

Quantiles quantiles_of(const Policy& policy, const Statistics& known, const Windows& windows) {
  const int64_t seen = needs_seen(policy) ? held(known.seen, windows.size) : 0;
  const int64_t accepted = needs_accepted(policy) ? held(known.accepted, windows.size) : 0;
  return {
      norm_at(windows.seen, seen, Rank::of_median_with_a_larger(seen)),
      norm_at(windows.accepted, accepted, Rank::of_quantile(accepted_quantile(policy), accepted))};
}

// Copies a struct of doubles from the elements of a tensor.
template <class Numbers>
Numbers read(const double* from) {
  Numbers numbers;
  std::memcpy(&numbers, from, sizeof(numbers));
  return numbers;
}

template <class Numbers>
void write(double* to, const Numbers& numbers) {
  static_assert(std::is_trivially_copyable_v<Numbers>);
  std::memcpy(to, &numbers, sizeof(numbers));
}

// `known`: the statistics after find_new_level.
void learn(
    const Policy& policy,
    const Judgement& judged,
    const Windows& windows,
    Statistics known,
    double* statistics) {
  if (!judged.seen) {
    return;
  }
  Statistics learnt = read<Statistics>(statistics);
  windows.seen[next_place(known.seen, windows.size)] = judged.norm;
  learnt.seen = known.seen + 1.0;
  if (!judged.skipped()) {
    windows.accepted[next_place(known.accepted, windows.size)] = judged.norm;
    absorb(policy, known, judged.norm, judged.adaptive);
    learnt.accepted = known.accepted;
    learnt.mean = known.mean;
    learnt.variance = known.variance;
  }
  write(statistics, learnt);
}

// The columns of the statistics of each tensor. There may be none.
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

// Sets AdaGC's coefficient for each tensor; returns the largest clipped norm.
double clip_each(
    const Policy& policy,
    const Judgement& judged,
    const double* norms,
    double step,
    const Columns& columns,
    Tensor grad_coef) {
  double* const coefs = grad_coef.mutable_data_ptr<double>();
  double applied = 0.0;
  for (int64_t i = 0; i < grad_coef.numel(); ++i) {
    const double norm = norms[i] * judged.factor;
    coefs[i] = adagc_coef(policy, judged.warm, norm, judged.global_coef, step, columns.at(i));
    applied = std::max(applied, norm * coefs[i]);
  }
  return applied;
}

// Updates the statistics of each tensor.
void remember_each(
    const Policy& policy,
    const Judgement& judged,
    const double* norms,
    const Tensor& grad_coef,
    double step,
    const Columns& columns) {
  const double* const coefs = grad_coef.const_data_ptr<double>();
  const int64_t next = grad_coef.dim();  // 0: the same coefficient for all
  for (int64_t i = 0; i < columns.n; ++i) {
    TensorStatistics of_tensor = columns.at(i);
    remember(policy, judged, norms[i] * judged.factor, coefs[next * i], step, of_tensor);
    columns.set(i, of_tensor);
  }
}

std::tuple<Tensor, Tensor> decide_cpu(const Tensor& total_norm, double max_norm, double skip_norm) {
  check_total_norm(total_norm);
  return tensors_of(decide(*total_norm.const_data_ptr<double>(), max_norm, skip_norm));
}

}  // namespace

std::tuple<Tensor, Tensor> tensors_of(const Decision& decision) {
  Tensor clip_coef = torch::stable::empty({}, ScalarType::Double);
  Tensor verdict = torch::stable::empty({}, ScalarType::Long);
  *clip_coef.mutable_data_ptr<double>() = decision.clip_coef;
  *verdict.mutable_data_ptr<int64_t>() = static_cast<int64_t>(decision.verdict);
  return {clip_coef, verdict};
}

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
  Statistics known = read<Statistics>(numbers);
  const Windows windows = {
      seen_norms.mutable_data_ptr<double>(),
      accepted_norms.mutable_data_ptr<double>(),
      seen_norms.numel()};
  Judgement judged = judge(
      policy,
      known,
      quantiles_of(policy, known, windows),
      *total_norm.const_data_ptr<double>(),
      value_or(unscale, 1.0),
      std::isfinite(value_or(loss, 0.0)));
  const bool adagc = policy.threshold == Threshold::adagc;
  const double now = static_cast<double>(step);
  Tensor grad_coef = torch::stable::empty(
      adagc ? std::vector<int64_t>{norms.numel()} : std::vector<int64_t>{}, ScalarType::Double);
  double* const coefs = grad_coef.mutable_data_ptr<double>();
  std::fill_n(coefs, grad_coef.numel(), judged.global_coef);
  const double* const each = norms.const_data_ptr<double>();
  const Columns columns = {per_tensor.mutable_data_ptr<double>(), per_tensor.size(1)};
  if (adagc && !judged.skipped()) {
    const double applied = clip_each(policy, judged, each, now, columns, grad_coef);
    apply_per_tensor(judged, smallest(coefs, norms.numel()), applied);
  }
  reject_too_large(judged);
  remember_each(policy, judged, each, grad_coef, now, columns);
  learn(policy, judged, windows, known, numbers);
  std::for_each(
      coefs, coefs + grad_coef.numel(), [&](double& coef) { coef = judged.grad_coef(coef); });
  Tensor record = torch::stable::empty({record_entries}, ScalarType::Double);
  write(record.mutable_data_ptr<double>(), record_of(judged, value_or(loss, NAN)));
  return {grad_coef, std::get<1>(tensors_of(judged.decision)), record};
}

}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("decide", TORCH_BOX(&fastguard::decide_cpu));
  m.impl("guard_decide_", TORCH_BOX(&fastguard::guard_decide_cpu));
}
