// The inner loops of grad_norm, without torch; compiled once per instruction set.
#pragma once

#include <cstdint>

namespace fastguard {

struct GradNormKernels {
  // Sum of squares of n consecutive elements, accumulated in double.
  double (*float32)(const void*, int64_t n);
  double (*float64)(const void*, int64_t n);
  double (*bfloat16)(const void*, int64_t n);
  double (*float16)(const void*, int64_t n);
};

extern const GradNormKernels grad_norm_kernels_default;
extern const GradNormKernels grad_norm_kernels_avx2;
extern const GradNormKernels grad_norm_kernels_avx512;

}  // namespace fastguard
