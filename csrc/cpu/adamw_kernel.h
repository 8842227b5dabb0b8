// The inner loop of adamw_, without torch; compiled once per instruction set.
#pragma once

#include "gradients_kernel.h"

#include <cstdint>

namespace fastguard {

// What one step does to every tensor ...
struct AdamwRule {
  double beta1;
  double beta2;
  double eps;
  double weight_decay;  // times lr where it is decoupled from the gradient
  bool coupled;
};

// ... and to one of them.
struct AdamwStep {
  double grad_coef;  // negative to maximize
  double step_size;  // lr / (1 - beta1^t)
  double root_factor;  // 1 / sqrt(1 - beta2^t)
};

// n consecutive elements; max_exp_avg_sq is null without amsgrad.
using AdamwFunction = void(
    void* param,
    const void* grad,
    void* exp_avg,
    void* exp_avg_sq,
    void* max_exp_avg_sq,
    int64_t n,
    const AdamwStep& step,
    const AdamwRule& rule);

struct AdamwKernels {
  PerDtype<AdamwFunction> same_dtype;  // by the dtype that parameter and gradient have
  PerDtype<AdamwFunction> float32_grad;  // by the parameter's; null for float64
};

extern const AdamwKernels adamw_kernels_default;
extern const AdamwKernels adamw_kernels_avx2;
extern const AdamwKernels adamw_kernels_avx512;

}  // namespace fastguard
