// The inner loops of add_layer_norm, without torch; compiled once per instruction set.
#pragma once

#include "gradients_kernel.h"

#include <cstdint>

namespace fastguard {

constexpr int64_t block_rows = 32;  // of a task

// Rows are of the operator's dtype; what belongs to a channel or a row is double for double rows,
// else float.
struct AddLayerNorm {
  int64_t rows;
  int64_t rows_of_scale;  // T, the rows that share a row of scale
  int64_t channels;
  const void* x;
  const void* branch;  // null: none, and sum is x and not written
  const void* scale;  // (rows / rows_of_scale, C), or null: ones
  double alpha;
  const void* weight;
  const void* bias;
  double eps;
  void* sum;
  void* normed;
  void* mean;  // of each row
  void* rstd;
  const void* grad_sum;  // null: zeros
  const void* grad_normed;
  void* grad_x;
  void* grad_branch;  // null: none
  void* partial;  // (blocks, 2, C): of the gradients of weight and bias
  void* grad_weight;
  void* grad_bias;
};

struct AddLayerNormKernels {
  PerDtype<void(const AddLayerNorm&, int64_t block)> forward;
  PerDtype<void(const AddLayerNorm&, int64_t block)> backward;
  // The blocks' parts of the gradients of weight and bias, added up in their order.
  PerDtype<void(const AddLayerNorm&)> add_partials;
};

extern const AddLayerNormKernels add_layer_norm_kernels_default;
extern const AddLayerNormKernels add_layer_norm_kernels_avx2;
extern const AddLayerNormKernels add_layer_norm_kernels_avx512;

}  // namespace fastguard
