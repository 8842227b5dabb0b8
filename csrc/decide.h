// The guard's decision, one source for CPU and CUDA. References: decide_ref and guard_decide_ref_
// in fastguard/ops/decide.py. fastguard/thresholds.py documents the thresholds and their sources.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>
#include <vector>

namespace fastguard {

enum class Verdict : int64_t { apply = 0, clip = 1, skip_nonfinite = 2, skip_outlier = 3 };

FASTGUARD_HOST_DEVICE inline bool skips(int64_t verdict) {
  return verdict >= static_cast<int64_t>(Verdict::skip_nonfinite);
}

struct Decision {
  // 1 on a skip: a caller who scales by it without reading the verdict changes nothing.
  double clip_coef;
  Verdict verdict;
};

FASTGUARD_HOST_DEVICE inline double clip_coef_of(double norm, double max_norm) {
  const double coef = max_norm / (norm + 1e-6);  // torch.nn.utils.clip_grad_norm_'s
  return coef < 1.0 ? coef : 1.0;
}

FASTGUARD_HOST_DEVICE inline Decision decide(double total_norm, double max_norm, double skip_norm) {
  if (!std::isfinite(total_norm)) {
    return {1.0, Verdict::skip_nonfinite};
  }
  if (total_norm > skip_norm) {
    return {1.0, Verdict::skip_outlier};
  }
  const double clip_coef = clip_coef_of(total_norm, max_norm);
  return {clip_coef, clip_coef < 1.0 ? Verdict::clip : Verdict::apply};
}

// The norm that clip_ decides by. With float32_norm it is rounded to float32, unless that is Inf: a
// caller who gets the norm in float32 then comes to the same decision.
FASTGUARD_HOST_DEVICE inline double as_returned(double total_norm, bool float32_norm) {
  const float rounded = static_cast<float>(total_norm);
  return float32_norm && std::isfinite(rounded) ? rounded : total_norm;
}

enum class Threshold : int64_t {
  fixed = 0,
  zclip = 1,
  running_median = 2,
  autoclip = 3,
  adagc = 4
};

// A step whose norm after clipping is above this is skipped. Such a norm is possible with
// max_norm=inf. Its squares would turn fp32 second moments into Inf, and the parameter would never
// move again.
constexpr double largest_applied = 1e18;

struct Policy {
  Threshold threshold;
  double max_norm;
  double skip_norm;
  double a;  // the options of the threshold, in the order of its dataclass
  double b;
  double warmup;  // accepted norms before the threshold leaves max_norm
};

inline Policy policy_of(
    int64_t threshold, double max_norm, double skip_norm, const std::vector<double>& options) {
  return {
      static_cast<Threshold>(threshold), max_norm, skip_norm, options[0], options[1], options[2]};
}

// The statistics beside the windows of the last norms: one tensor of four numbers, in this order.
// They never take in a NaN, an Inf or a zero.
struct Statistics {
  double seen;  // the number of norms, skipped steps included
  double accepted;  // the number of norms of steps that were taken
  double mean;  // ZClip's mean of the accepted norms
  double variance;
};

// A count of norms as an integer >= 0. The given count may be any number.
FASTGUARD_HOST_DEVICE inline int64_t whole(double count) {
  constexpr double most = 9007199254740992.0;  // 2^53
  return count >= 1.0 ? static_cast<int64_t>(count < most ? count : most) : 0;
}

// The number of norms in a window after `count` norms.
FASTGUARD_HOST_DEVICE inline int64_t held(double count, int64_t window) {
  return whole(count) < window ? whole(count) : window;
}

// The index in a window for the next norm, which replaces the oldest one.
FASTGUARD_HOST_DEVICE inline int64_t next_place(double count, int64_t window) {
  return whole(count) % window;
}

// Ascending order with NaN as the largest, which is a strict order for all contents of a window.
FASTGUARD_HOST_DEVICE inline bool less(double a, double b) {
  return a < b || (std::isnan(b) && !std::isnan(a));
}

// A place among `size` > 0 norms in ascending order, for linear interpolation between neighbours.
struct Rank {
  int64_t below;
  int64_t above;
  double fraction;

  FASTGUARD_HOST_DEVICE Rank(double place, int64_t size)
      : below(static_cast<int64_t>(place)),
        above(below + 1 < size ? below + 1 : below),
        fraction(place - static_cast<double>(below)) {}

  // The place of a quantile, as numpy.percentile has it.
  FASTGUARD_HOST_DEVICE static Rank of_quantile(double q, int64_t size) {
    return {q * static_cast<double>(size - 1), size};
  }
  // The place of the median of these norms and one more norm that is above them all.
  FASTGUARD_HOST_DEVICE static Rank of_median_with_a_larger(int64_t size) {
    return {0.5 * static_cast<double>(size), size};
  }
  FASTGUARD_HOST_DEVICE double between(double low, double high) const {
    return low + (high - low) * fraction;
  }
};

// Quantiles of the norms in the two windows; 0 without norms, or if the decision does not need it.
struct Quantiles {
  double seen_median;  // the median of the seen norms and one more that is larger
  double accepted;  // the quantile of the accepted norms that the threshold needs
};

FASTGUARD_HOST_DEVICE inline bool needs_seen(const Policy& policy) {
  return policy.skip_norm < INFINITY || policy.threshold == Threshold::zclip;
}

FASTGUARD_HOST_DEVICE inline bool needs_accepted(const Policy& policy) {
  return policy.threshold == Threshold::running_median || policy.threshold == Threshold::autoclip;
}

// The quantile of the accepted norms that the threshold needs, in [0, 1] for all options.
FASTGUARD_HOST_DEVICE inline double accepted_quantile(const Policy& policy) {
  const double q = policy.threshold == Threshold::autoclip ? policy.a / 100.0 : 0.5;
  return q > 0.0 ? (q < 1.0 ? q : 1.0) : 0.0;
}

constexpr double outlier_after = 16.0;  // norms; a median of fewer says little
constexpr double outlier_factor = 4.0;

// A finite norm above this is an outlier: it is above skip_norm and above 4 times the median of the
// last norms and itself. Skipped norms count for the median, so a level that persists becomes
// ordinary. The norm itself counts too, so of two alternating levels neither is an outlier,
// whichever came first. A norm below the larger of the two middle norms is no outlier in any case.
// The median may therefore treat the norm as larger than all others.
FASTGUARD_HOST_DEVICE inline double outlier_above(
    const Policy& policy, const Statistics& statistics, double seen_median) {
  if (!(statistics.seen >= outlier_after)) {
    return INFINITY;
  }
  const double usual = outlier_factor * seen_median;
  return usual > policy.skip_norm ? usual : policy.skip_norm;
}

FASTGUARD_HOST_DEVICE inline bool is_warm(const Policy& policy, const Statistics& statistics) {
  return statistics.accepted >= policy.warmup && statistics.accepted >= 1.0;
}

// ZClip learns from clipped norms. After norms have risen for good, it would therefore clip for
// ever. If this norm and the median of the last norms are both spikes, they are the new level: the
// median becomes the mean, and the distance between old and new mean becomes the deviation. This is
// not in the paper. Returns the deviation.
FASTGUARD_HOST_DEVICE inline double find_new_level(
    const Policy& policy, Statistics& statistics, double seen_median, double norm) {
  if (policy.threshold != Threshold::zclip || !is_warm(policy, statistics)) {
    return 0.0;  // not used
  }
  const double deviation = std::sqrt(statistics.variance);
  const double spike = statistics.mean + policy.a * deviation;
  if (!(statistics.seen >= outlier_after && norm > spike && seen_median > spike)) {
    return deviation;
  }
  const double moved = seen_median - statistics.mean;
  statistics.mean = seen_median;
  statistics.variance = moved * moved;
  return moved;
}

// The largest norm that the threshold does not clip, before max_norm caps it.
FASTGUARD_HOST_DEVICE inline double adaptive_limit(
    const Policy& policy,
    const Statistics& statistics,
    double deviation,
    double accepted_quantile,
    double total_norm) {
  if (policy.threshold == Threshold::fixed || !is_warm(policy, statistics)) {
    return INFINITY;
  }
  switch (policy.threshold) {
    case Threshold::zclip: {
      const double above = total_norm - statistics.mean;
      // The condition is z > a, without a division by the deviation, which may be 0. The limit lies
      // a^2 sigma / z above the mean.
      return above > policy.a * deviation
          ? statistics.mean + policy.a * policy.a * statistics.variance / above
          : INFINITY;
    }
    case Threshold::running_median:
      return policy.a * accepted_quantile;
    case Threshold::autoclip:
      return accepted_quantile;
    default:
      return INFINITY;
  }
}

// Updates the statistics by an accepted norm.
FASTGUARD_HOST_DEVICE inline void absorb(
    const Policy& policy, Statistics& statistics, double norm, double limit) {
  statistics.accepted += 1.0;
  if (policy.threshold != Threshold::zclip) {
    return;
  }
  if (statistics.accepted <= policy.warmup) {  // Welford's mean and variance
    const double delta = norm - statistics.mean;
    statistics.mean += delta / statistics.accepted;
    statistics.variance +=
        (delta * (norm - statistics.mean) - statistics.variance) / statistics.accepted;
    return;
  }
  const double clipped = norm < limit ? norm : limit;
  statistics.mean = policy.b * statistics.mean + (1.0 - policy.b) * clipped;
  const double deviation = clipped - statistics.mean;
  statistics.variance = policy.b * statistics.variance + (1.0 - policy.b) * deviation * deviation;
}

// The statistics of one tensor's norm: a column of the operators' (4, N), in this order.
struct TensorStatistics {
  double ema;  // AdaGC's moving average of the clipped norm; inf before the first one
  double clipped_since;  // the step since which AdaGC clips it to less than half; -1 if it does not
  double usual;  // a moving average of the norm, for all thresholds; inf before the first one
  double risen_since;  // the step since which the norm is above 4 times `usual`; -1 if it is not
};

constexpr double usual_beta = 0.98;
constexpr double risen_factor = 4.0;

// AdaGC learns from clipped norms, so its average rises by at most 0.1 % per step. A tensor that
// was clipped to less than half for this many steps has a new level: the average restarts at the
// usual norm. This is not in the paper.
constexpr double adagc_restart_after = 128.0;

FASTGUARD_HOST_DEVICE inline bool adagc_restarts(const TensorStatistics& known, double step) {
  return known.clipped_since >= 0.0 && step - known.clipped_since >= adagc_restart_after &&
      known.usual < INFINITY && known.usual > known.ema;
}

// AdaGC's coefficient for one tensor. A tensor with its first gradient after the warm-up is clipped
// to max_norm by its own norm.
FASTGUARD_HOST_DEVICE inline double adagc_coef(
    const Policy& policy,
    bool warm,
    double norm,
    double global_coef,
    double step,
    const TensorStatistics& known) {
  if (norm == 0.0) {
    return 1.0;
  }
  if (!warm || !(known.ema < INFINITY)) {
    return warm ? clip_coef_of(norm, policy.max_norm) : global_coef;
  }
  const double average = adagc_restarts(known, step) ? known.usual : known.ema;
  const double ratio = policy.a * average / norm;
  return ratio < 1.0 ? ratio : 1.0;
}

// Updates AdaGC's average by the norm of a tensor in a step that was taken with this coefficient. A
// norm of 0 does not count: an average of 0 would clip the tensor to 0 for ever.
FASTGUARD_HOST_DEVICE inline void adagc_absorb(
    const Policy& policy,
    bool warm,
    double norm,
    double coef,
    double step,
    TensorStatistics& known) {
  if (norm == 0.0) {
    return;
  }
  const double clipped = coef * norm;
  if (!warm || !(known.ema < INFINITY)) {
    known.ema = clipped < known.ema ? clipped : known.ema;
    return;
  }
  const bool restarts = adagc_restarts(known, step);
  const double average = restarts ? known.usual : known.ema;
  known.ema = policy.b * average + (1.0 - policy.b) * clipped;
  const bool goes_on = known.clipped_since >= 0.0 && !restarts;
  known.clipped_since = coef < 0.5 ? (goes_on ? known.clipped_since : step) : -1.0;
}

// Updates a tensor's usual norm. A norm counts as at most 4 times the present value, so one spike
// raises it by 6 %.
FASTGUARD_HOST_DEVICE inline void see(double norm, double step, TensorStatistics& known) {
  if (norm == 0.0) {
    return;  // does not tell the size of an ordinary gradient
  }
  if (!(known.usual < INFINITY)) {
    known.usual = norm;
    return;
  }
  const double most = risen_factor * known.usual;
  known.risen_since = norm > most ? (known.risen_since >= 0.0 ? known.risen_since : step) : -1.0;
  known.usual = usual_beta * known.usual + (1.0 - usual_beta) * (norm < most ? norm : most);
}

// The intermediate values and the result of one decision. A device calls, in this order: judge; for
// AdaGC adagc_coef of each tensor and apply_per_tensor; reject_too_large. Then it updates the
// statistics: `remember` for each tensor, the window of seen norms and, unless the step is skipped,
// the window of accepted norms and `absorb`.
struct Judgement {
  double factor;  // divides the measured norms by their scale
  double norm;
  double adaptive;
  double limit;
  double outlier_above;
  double global_coef;
  double applied;  // the largest norm after clipping
  bool warm;
  // Whether this norm counts as seen. It does not in a step without gradients, or with a NaN or Inf
  // in the norm or the loss.
  bool seen;
  Decision decision;

  FASTGUARD_HOST_DEVICE bool skipped() const {
    return skips(static_cast<int64_t>(decision.verdict));
  }
  // The factor for the gradients, from their `clip_coef`.
  FASTGUARD_HOST_DEVICE double grad_coef(double clip_coef) const {
    return skipped() ? 1.0 : clip_coef * factor;
  }
};

// The report of a decision for the host: the elements of the operators' `record`, in this order.
struct Record {
  double verdict;
  double clip_coef;  // the smallest coefficient
  double total_norm;  // after unscaling
  double limit;
  double loss;  // NaN if none was given
  double outlier_above;
};

constexpr int64_t record_entries = sizeof(Record) / sizeof(double);

FASTGUARD_HOST_DEVICE inline Record record_of(const Judgement& judged, double loss) {
  return {
      static_cast<double>(judged.decision.verdict),
      judged.decision.clip_coef,
      judged.norm,
      judged.limit,
      loss,
      judged.outlier_above};
}

// The decision by the global norm. It changes `statistics` if the norms have found a new level.
FASTGUARD_HOST_DEVICE inline Judgement judge(
    const Policy& policy,
    Statistics& statistics,
    const Quantiles& quantiles,
    double total_norm,
    double unscale,
    bool loss_is_finite) {
  Judgement judged{};
  judged.factor = unscale;
  judged.norm = total_norm * unscale;
  const double deviation = find_new_level(policy, statistics, quantiles.seen_median, judged.norm);
  judged.adaptive = adaptive_limit(policy, statistics, deviation, quantiles.accepted, judged.norm);
  judged.warm = statistics.accepted >= policy.warmup;
  const double capped = judged.adaptive < policy.max_norm ? judged.adaptive : policy.max_norm;
  judged.limit = policy.threshold == Threshold::adagc && judged.warm ? INFINITY : capped;
  judged.outlier_above = outlier_above(policy, statistics, quantiles.seen_median);
  judged.seen = loss_is_finite && std::isfinite(judged.norm) && judged.norm > 0.0;
  judged.decision = decide(loss_is_finite ? judged.norm : NAN, judged.limit, judged.outlier_above);
  judged.global_coef = judged.decision.clip_coef;
  judged.applied = judged.norm * judged.global_coef;
  return judged;
}

// The decision by AdaGC's coefficients: `smallest` is the smallest coefficient, `applied` the
// largest clipped norm.
FASTGUARD_HOST_DEVICE inline void apply_per_tensor(
    Judgement& judged, double smallest, double applied) {
  judged.decision = {smallest, smallest < 1.0 ? Verdict::clip : Verdict::apply};
  judged.applied = applied;
}

FASTGUARD_HOST_DEVICE inline void reject_too_large(Judgement& judged) {
  if (judged.applied > largest_applied && !judged.skipped()) {
    judged.decision = {1.0, Verdict::skip_outlier};
  }
}

// Updates the statistics of one tensor by its norm and, for AdaGC, its coefficient.
FASTGUARD_HOST_DEVICE inline void remember(
    const Policy& policy,
    const Judgement& judged,
    double norm,
    double coef,
    double step,
    TensorStatistics& known) {
  if (policy.threshold == Threshold::adagc && !judged.skipped()) {
    adagc_absorb(policy, judged.warm, norm, coef, step, known);
  }
  if (judged.seen) {
    see(norm, step, known);
  }
}

// GradScaler.update: a NaN or Inf shrinks the scale; `interval` steps without one let it grow.
struct Growth {
  double growth_factor;
  double backoff_factor;
  int64_t interval;
};

inline Growth growth_of(const std::vector<double>& growth) {
  return {growth[0], growth[1], whole(growth[2])};
}

FASTGUARD_HOST_DEVICE inline void grow(
    const Growth& growth, bool found_inf, float& scale, int32_t& growth_tracker) {
  if (found_inf) {
    scale = static_cast<float>(scale * growth.backoff_factor);
    growth_tracker = 0;
    return;
  }
  // Unsigned arithmetic, because the given tracker may be the largest int32.
  growth_tracker = static_cast<int32_t>(static_cast<uint32_t>(growth_tracker) + 1u);
  if (growth_tracker == growth.interval) {
    const float grown = static_cast<float>(scale * growth.growth_factor);
    scale = std::isfinite(grown) ? grown : scale;
    growth_tracker = 0;
  }
}

}  // namespace fastguard
