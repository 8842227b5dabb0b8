// The inner loop of adamw_, without torch; compiled once per instruction set.
#pragma once

#include "adamw_update.h"
#include "gradients_kernel.h"

#include <cstdint>

namespace fastguard {

// n consecutive elements; max_exp_avg_sq is null without amsgrad.
using AdamwFunction = void(
    void* param,
    const void* grad,
    void* exp_avg,
    void* exp_avg_sq,
    void* max_exp_avg_sq,
    int64_t n,
    double grad_coef,
    const BiasCorrection& bias,
    const AdamwOptions& options);

struct AdamwKernels {
  PerDtype<AdamwFunction> same_dtype;  // by the dtype of parameter and gradient
  PerDtype<AdamwFunction> float32_grad;  // by the dtype of the parameter; null for float64
};

extern const AdamwKernels adamw_kernels_default;
extern const AdamwKernels adamw_kernels_avx2;
extern const AdamwKernels adamw_kernels_avx512;

}  // namespace fastguard
