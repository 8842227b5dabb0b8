// The inner loops of attention, without torch; compiled once per instruction set.
#pragma once

#include "attention_problem.h"

namespace fastguard {

// What a thread needs beside its results, in bytes; the kernels align it themselves.
struct AttentionKernel {
  int64_t key_unit;  // The number of a panel's columns is a multiple of it.
  int64_t (*forward_scratch)(const AttentionProblem&);
  int64_t (*backward_scratch)(const AttentionProblem&);
  // Rows begin to end, of multiples of `row_block`, of one head.
  void (*forward)(const AttentionProblem&, const ForwardTask&, void* scratch);
  // The keys of one chunk of one head of the keys.
  void (*backward)(const AttentionProblem&, const BackwardTask&, void* scratch);
  // What the chunks of one head made of the query's gradient, added up in their order.
  void (*add_partials)(const AttentionProblem&, int64_t b, int64_t h);
};

struct AttentionKernels {
  AttentionKernel float32, float64, bfloat16, float16;
};

extern const AttentionKernels attention_kernels_default;
extern const AttentionKernels attention_kernels_avx2;
extern const AttentionKernels attention_kernels_avx512;
extern const AttentionKernel attention_bf16_kernel_avx512_bf16;
extern const AttentionKernel attention_bf16_kernel_amx;

}  // namespace fastguard
