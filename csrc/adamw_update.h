// The arithmetic of adamw_, one source for CPU and CUDA. Reference: adamw_ref_ in
// fastguard/ops/adamw.py. Only operations that are written as fma are contracted. The functions are
// static, because the CPU's kernels are compiled once per instruction set: each file needs its own
// copy.
#pragma once

#include "adamw_options.h"
#include "host_device.h"

#include <cmath>

namespace fastguard {

// The bias correction of step t.
struct BiasCorrection {
  double step_size;  // lr / (1 - beta1^t)
  double root_factor;  // 1 / sqrt(1 - beta2^t)
};

FASTGUARD_HOST_DEVICE static inline BiasCorrection bias_correction_of(
    const AdamwOptions& options, double beta1_to_t, double beta2_to_t) {
  return {options.lr / (1.0 - beta1_to_t), 1.0 / std::sqrt(1.0 - beta2_to_t)};
}

// The numbers that are the same for all elements of a tensor, in the moments' precision.
template <class Real>
struct AdamwRule {
  double grad_coef;  // negative to maximize
  Real beta1, to1, beta2, to2, eps;
  Real weight_decay;  // times lr where it is decoupled from the gradient
  Real step_size, root_factor;
  bool coupled;
};

template <class Real>
FASTGUARD_HOST_DEVICE static inline AdamwRule<Real> adamw_rule_of(
    const AdamwOptions& options, const BiasCorrection& bias, double grad_coef) {
  const double decay = options.weight_decay * (options.decoupled_weight_decay ? options.lr : 1.0);
  return {
      options.maximize ? -grad_coef : grad_coef,
      static_cast<Real>(options.beta1),
      static_cast<Real>(1.0 - options.beta1),
      static_cast<Real>(options.beta2),
      static_cast<Real>(1.0 - options.beta2),
      static_cast<Real>(options.eps),
      static_cast<Real>(decay),
      static_cast<Real>(bias.step_size),
      static_cast<Real>(bias.root_factor),
      !options.decoupled_weight_decay && options.weight_decay != 0.0};
}

// max(a, b); NaN if one of them is.
template <class Real>
FASTGUARD_HOST_DEVICE static inline Real larger(Real a, Real b) {
  const Real most = a > b ? a : b;
  return a != a ? a : most;
}

// The new value of the parameter p for the scaled gradient. Updates the moments m and v and, with
// amsgrad, the largest v. `coupled` equals that of the rule; a loop may pass it as a constant. Real
// is float or double, or a vector of them with functions `sqrt` and `larger` of its own.
template <bool amsgrad, class Real>
FASTGUARD_HOST_DEVICE static inline Real adamw_update(
    const AdamwRule<Real>& rule,
    bool coupled,
    Real p,
    Real scaled,
    Real& m,
    Real& v,
    Real& largest) {
  using std::sqrt;
  const Real g = coupled ? scaled + rule.weight_decay * p : scaled;
  m = rule.beta1 * m + rule.to1 * g;
  v = rule.beta2 * v + rule.to2 * g * g;
  Real under_root = v;
  if constexpr (amsgrad) {
    under_root = larger(v, largest);
    largest = under_root;
  }
  const Real move = rule.step_size * (m / (sqrt(under_root) * rule.root_factor + rule.eps));
  // Decay and move are subtracted together. Rounded to float, 1 - lr * weight_decay has an error of
  // a quarter of the decay at lr = 1e-5. Subtracted alone, the decay is below the last bit.
  return p - (coupled ? move : rule.weight_decay * p + move);
}

}  // namespace fastguard
