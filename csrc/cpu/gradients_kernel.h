// The inner loops over gradients, without torch; compiled once per instruction set.
#pragma once

#include <cstdint>

namespace fastguard {

template <class Function>
struct PerDtype {
  Function* float32;
  Function* float64;
  Function* bfloat16;
  Function* float16;
};

struct GradientKernels {
  // Sum of the squares of n consecutive elements, accumulated in double.
  PerDtype<double(const void*, int64_t n)> sum_squares;
  // Multiplies n consecutive elements by a factor, computed in double and rounded once per format.
  PerDtype<void(void*, int64_t n, double factor)> scale;
  // sum += grad, by the dtype of grad. The sum is float64 for float64 gradients, else float32.
  PerDtype<void(void* sum, const void* grad, int64_t n)> add;
};

extern const GradientKernels gradient_kernels_default;
extern const GradientKernels gradient_kernels_avx2;
extern const GradientKernels gradient_kernels_avx512;

// The table of the instruction set that capability.h chose.
const GradientKernels& gradient_kernels();

}  // namespace fastguard
