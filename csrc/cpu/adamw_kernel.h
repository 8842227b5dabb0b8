// The inner loop of adamw_, without torch; compiled once per instruction set.
#pragma once

#include "adamw_update.h"
#include "gradients_kernel.h"

#include <cstdint>

namespace fastguard {

// n consecutive elements of a parameter, with their gradient and moments.
struct AdamwRange {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* master;  // null without masters, which only 16-bit parameters have
  int64_t n;
};

// Software prefetch reads `prefetch_bytes` ahead in each array.
using AdamwFunction = void(
    const AdamwRange& range,
    double grad_coef,
    const BiasCorrection& bias,
    const AdamwOptions& options,
    int64_t prefetch_bytes);

struct AdamwKernels {
  PerDtype<AdamwFunction> same_dtype;  // by the dtype of parameter and gradient
  PerDtype<AdamwFunction> float32_grad;  // by the dtype of the parameter; null for float64
};

extern const AdamwKernels adamw_kernels_default;
extern const AdamwKernels adamw_kernels_avx2;
extern const AdamwKernels adamw_kernels_avx512;

}  // namespace fastguard
