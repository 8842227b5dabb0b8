// accumulate_: adds one micro-batch's gradients to the sums, unless its verdict is a skip.
// Reference: accumulate_ref_ in fastguard/ops/accumulate.py.
#pragma once

#include "cuda/elements.cuh"
#include "decide.h"

namespace fastguard {

// Reads `width` elements in one instruction, as words: squares.cuh gives the reason.
template <int width, class Sum, class T>
__device__ inline void accumulate_elements(Sum* sums, const T* grads, int n) {
  using SumVector = Vector<Sum, width>;
  using GradVector = Vector<T, width>;
  using SumWord = std::conditional_t<width == 1, SumVector, Word16>;
  using GradWord =
      std::conditional_t<width == 1, GradVector, Vector<uint32_t, sizeof(GradVector) / 4>>;
  for (int i = threadIdx.x; within(i, n / width); i += threads) {
    const auto grad = bits_as<GradVector>(load_once(reinterpret_cast<const GradWord*>(grads) + i));
    auto sum = bits_as<SumVector>(load(reinterpret_cast<const SumWord*>(sums) + i));
#pragma unroll
    for (int j = 0; j < width; ++j) {
      sum.at[j] += widened(grad.at[j]);
    }
    store(reinterpret_cast<SumWord*>(sums) + i, bits_as<SumWord>(sum));
  }
}

__device__ inline void accumulate_chunk(const Chunk& chunk) {
  with_type(chunk.other_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr int width = 16 / sizeof(Sum);
    Sum* sums = reinterpret_cast<Sum*>(chunk.data);
    const T* grads = reinterpret_cast<const T*>(chunk.other);
    const bool aligned = chunk.data % 16 == 0 && chunk.other % (width * sizeof(T)) == 0;
    const int done = aligned ? chunk.size() / width * width : 0;
    accumulate_elements<width>(sums, grads, done);
    accumulate_elements<1>(sums + done, grads + done, chunk.size() - done);
  });
}

// window: the number of micro-batches, the number of good ones, the weight of the good ones.
__global__ __launch_bounds__(threads, blocks_per_sm) void accumulate_kernel(
    Plan plan, const int64_t* verdict, double* window, double weight) {
  const bool good = !skips(load(verdict));
  for (int c = blockIdx.x; good && c < plan.n_chunks; c += gridDim.x) {
    accumulate_chunk(load_chunk(plan.chunks + c));
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store(window, load(window) + 1.0);
    store(window + 1, load(window + 1) + (good ? 1.0 : 0.0));
    store(window + 2, load(window + 2) + (good ? weight : 0.0));
  }
}

}  // namespace fastguard
