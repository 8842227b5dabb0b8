// guard_decide_ and decide. References: guard_decide_ref_ and decide_ref in
// fastguard/ops/decide.py.
#pragma once

#include "cuda/judge.cuh"

namespace fastguard {

// The launch has one block, so it may use all registers.
__global__ __launch_bounds__(threads, 1) void guard_decide_kernel(
    Deciding deciding, const double* total_norm, const double* norms, int32_t n) {
  decide_in_block(deciding, load(total_norm), norms, n);
}

// The decision without statistics, for clipping.
__global__ void decide_kernel(
    const double* total_norm,
    double max_norm,
    double skip_norm,
    double* clip_coef,
    int64_t* verdict) {
  if (threadIdx.x == 0) {
    const Decision decision = decide(load(total_norm), max_norm, skip_norm);
    store(clip_coef, decision.clip_coef);
    store(verdict, static_cast<int64_t>(decision.verdict));
  }
}

}  // namespace fastguard
