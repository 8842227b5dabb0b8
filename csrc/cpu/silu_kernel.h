// The inner loops of silu, without torch; compiled once per instruction set.
#pragma once

#include "gradients_kernel.h"

#include <cstdint>

namespace fastguard {

struct SiluKernels {
  PerDtype<void(const void* x, void* output, int64_t n)> forward;
  PerDtype<void(const void* grad_output, const void* x, void* grad_x, int64_t n)> backward;
};

extern const SiluKernels silu_kernels_default;
extern const SiluKernels silu_kernels_avx2;
extern const SiluKernels silu_kernels_avx512;

}  // namespace fastguard
