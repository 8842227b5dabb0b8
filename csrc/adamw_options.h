// Without torch: for the kernels.
#pragma once

namespace fastguard {

struct AdamwOptions {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
  bool decoupled_weight_decay;
  bool maximize;
};

}  // namespace fastguard
