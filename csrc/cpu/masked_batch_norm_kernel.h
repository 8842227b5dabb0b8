// The inner loops of masked_batch_norm, without torch; compiled once per instruction set.
#pragma once

#include "gradients_kernel.h"
#include "strip_channels.h"

#include <cstdint>

namespace fastguard {

// Frames are of the operator's dtype; what belongs to a channel is double for double frames, else
// float.
struct MaskedBatchNorm {
  int64_t frames;
  int64_t channels;
  int64_t valid;  // frames that are no padding
  const uint8_t* padded;  // of each frame
  double eps;
  bool of_batch;  // whether mean and variance are those of the valid frames
  bool silu;
  const void* x;
  const void* weight;
  const void* bias;
  void* mean;  // written if of_batch, else read
  void* var;
  void* output;
  const void* grad_output;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
};

struct MaskedBatchNormKernels {
  // Of the channels from `first` on, at most `strip_channels`.
  PerDtype<void(const MaskedBatchNorm&, int64_t first)> forward;
  PerDtype<void(const MaskedBatchNorm&, int64_t first)> backward;
};

extern const MaskedBatchNormKernels masked_batch_norm_kernels_default;
extern const MaskedBatchNormKernels masked_batch_norm_kernels_avx2;
extern const MaskedBatchNormKernels masked_batch_norm_kernels_avx512;

}  // namespace fastguard
