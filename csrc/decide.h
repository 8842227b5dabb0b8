// The guard's decision, one function for CPU and CUDA. Reference: decide_ref in fastguard/ops.py.
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

struct Decision {
  // 1 on a skip, so that whoever scales by it without looking at the verdict changes nothing.
  double clip_coef;
  Verdict verdict;
};

FASTGUARD_HOST_DEVICE inline Decision decide(double total_norm, double max_norm, double skip_norm) {
  if (!std::isfinite(total_norm)) {
    return {1.0, Verdict::skip_nonfinite};
  }
  if (total_norm > skip_norm) {
    return {1.0, Verdict::skip_outlier};
  }
  const double clip_coef = max_norm / (total_norm + 1e-6);  // torch.nn.utils.clip_grad_norm_'s
  if (clip_coef < 1.0) {
    return {clip_coef, Verdict::clip};
  }
  return {1.0, Verdict::apply};
}

}  // namespace fastguard
