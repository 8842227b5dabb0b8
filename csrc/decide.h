// The guard's decision, one source for CPU and CUDA. References: decide_ref and guard_decide_ref_ in
// fastguard/ops.py; what the thresholds mean and where they come from: fastguard/thresholds.py.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define FASTGUARD_HOST_DEVICE __host__ __device__
#else
#define FASTGUARD_HOST_DEVICE
#endif

namespace fastguard {

enum class Verdict : int64_t { apply = 0, clip = 1, skip_nonfinite = 2, skip_outlier = 3 };

FASTGUARD_HOST_DEVICE inline bool skips(int64_t verdict) {
  return verdict >= static_cast<int64_t>(Verdict::skip_nonfinite);
}

struct Decision {
  // 1 on a skip, so that whoever scales by it without looking at the verdict changes nothing.
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

enum class Threshold : int64_t { fixed = 0, zclip = 1, running_median = 2, autoclip = 3, adagc = 4 };

// No step is taken along a gradient above this norm, clipping included: with max_norm=inf its squares
// would make an Inf of fp32 second moments, and the parameter would never move again.
constexpr double largest_applied = 1e18;

struct Policy {
  Threshold threshold;
  double max_norm;
  double skip_norm;
  double a;  // the options of the threshold, in the order of its dataclass
  double b;
  double warmup;  // accepted norms before the threshold leaves max_norm
};

// What is remembered of accepted norms; a NaN, an Inf and a skipped norm never get in.
struct Statistics {
  double accepted;
  double mean;
  double variance;
};

// The last accepted norms in ascending order.
struct Sorted {
  const double* norms;
  int64_t size;

  // Linear between neighbours, as numpy.percentile and statistics.median.
  FASTGUARD_HOST_DEVICE double quantile(double q) const {
    const double place = q * static_cast<double>(size - 1);
    const int64_t below = static_cast<int64_t>(place);
    const double low = norms[below];
    const double high = norms[below + 1 < size ? below + 1 : below];
    return low + (high - low) * (place - static_cast<double>(below));
  }
};

constexpr double armed_after = 16.0;  // a median of fewer says little

FASTGUARD_HOST_DEVICE inline bool armed(
    const Statistics& statistics, const Sorted& sorted, double skip_norm) {
  return statistics.accepted >= armed_after && sorted.quantile(0.5) < skip_norm;
}

// What the threshold lets through unclipped, before max_norm caps it.
FASTGUARD_HOST_DEVICE inline double adaptive_limit(
    const Policy& policy, const Statistics& statistics, const Sorted& sorted, double total_norm) {
  if (policy.threshold == Threshold::fixed || statistics.accepted < policy.warmup ||
      statistics.accepted < 1.0) {
    return INFINITY;
  }
  switch (policy.threshold) {
    case Threshold::zclip: {
      const double above = total_norm - statistics.mean;
      // z > a, without dividing by a deviation that may be 0; a^2 sigma / z above the mean.
      return above > policy.a * std::sqrt(statistics.variance)
          ? statistics.mean + policy.a * policy.a * statistics.variance / above
          : INFINITY;
    }
    case Threshold::running_median:
      return policy.a * sorted.quantile(0.5);
    case Threshold::autoclip:
      return sorted.quantile(policy.a / 100.0);
    default:
      return INFINITY;
  }
}

FASTGUARD_HOST_DEVICE inline void absorb(
    const Policy& policy, Statistics& statistics, double* history, int64_t window, double norm,
    double limit) {
  if (norm == 0.0) {
    return;  // a step without gradients says nothing about their size
  }
  history[static_cast<int64_t>(statistics.accepted) % window] = norm;
  statistics.accepted += 1.0;
  if (policy.threshold != Threshold::zclip) {
    return;
  }
  if (statistics.accepted <= policy.warmup) {  // Welford's mean and variance
    const double delta = norm - statistics.mean;
    statistics.mean += delta / statistics.accepted;
    statistics.variance += (delta * (norm - statistics.mean) - statistics.variance) / statistics.accepted;
    return;
  }
  const double clipped = norm < limit ? norm : limit;
  statistics.mean = policy.b * statistics.mean + (1.0 - policy.b) * clipped;
  const double deviation = clipped - statistics.mean;
  statistics.variance = policy.b * statistics.variance + (1.0 - policy.b) * deviation * deviation;
}

// AdaGC's coefficient for one tensor; `ema` is updated if `accept`. An `ema` of inf was never set,
// and a norm of 0 never sets it: nothing of this tensor would be let through ever after. What has
// its first gradient after the warm-up is clipped to max_norm by itself.
FASTGUARD_HOST_DEVICE inline double adagc_coef(
    const Policy& policy, bool warm, double norm, double global_coef, double& ema, bool accept) {
  if (norm == 0.0) {
    return 1.0;
  }
  const bool known = warm && ema < INFINITY;
  const double ratio = policy.a * ema / norm;
  const double otherwise = warm ? clip_coef_of(norm, policy.max_norm) : global_coef;
  const double coef = known ? (ratio < 1.0 ? ratio : 1.0) : otherwise;
  if (accept) {
    const double clipped = coef * norm;
    ema = known ? policy.b * ema + (1.0 - policy.b) * clipped : (clipped < ema ? clipped : ema);
  }
  return coef;
}

}  // namespace fastguard
