// One thread decides; the verdict stays on the device.
#pragma once

#include "decide.h"

namespace fastguard {

__global__ void decide_kernel(
    const double* total_norm, double max_norm, double skip_norm, double* clip_coef, int64_t* verdict) {
  const Decision decision = decide(*total_norm, max_norm, skip_norm);
  *clip_coef = decision.clip_coef;
  *verdict = static_cast<int64_t>(decision.verdict);
}

}  // namespace fastguard
