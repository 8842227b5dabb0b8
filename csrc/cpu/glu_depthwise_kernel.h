// The inner loops of glu_depthwise, without torch; compiled once per instruction set.
#pragma once

#include "gradients_kernel.h"
#include "strip_channels.h"

#include <cstdint>

namespace fastguard {

constexpr int64_t most_taps = 65;
constexpr int64_t block_frames = 64;  // of a task of the forward pass

// Frames are of the operator's dtype; weights are double for double frames, else float.
struct GluDepthwise {
  int64_t batch;
  int64_t frames;
  int64_t channels;
  int64_t taps;
  const uint8_t* padded;  // (B, T)
  const void* x;  // (B, T, 2 C)
  const void* weight;  // (C, K)
  void* output;  // (B, T, C)
  const void* grad_output;
  void* grad_x;
  void* grad_weight;
};

struct GluDepthwiseKernels {
  // Frames from `frame` on of utterance b, channels from `channel` on.
  PerDtype<void(const GluDepthwise&, int64_t b, int64_t frame, int64_t channel)> forward;
  // All frames of all utterances.
  PerDtype<void(const GluDepthwise&, int64_t channel)> backward;
};

extern const GluDepthwiseKernels glu_depthwise_kernels_default;
extern const GluDepthwiseKernels glu_depthwise_kernels_avx2;
extern const GluDepthwiseKernels glu_depthwise_kernels_avx512;

}  // namespace fastguard
