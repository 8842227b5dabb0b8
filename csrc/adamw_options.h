// The options of adamw_ for the kernels, without torch.
#pragma once

namespace fastguard {

constexpr int packed_alignment = 16;  // elements: 64 bytes of float32, a cache line

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
