// accumulate_: adds one micro-batch's gradients to the sums, unless its verdict is a skip.
// Reference: accumulate_ref_ in fastguard/ops.py.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/reduce.cuh"
#include "decide.h"

namespace fastguard {

// `width` elements in one instruction; words, for the reason that squares.cuh gives. What the sums
// were before is read unless this is the `first` micro-batch.
template <bool first, int width, class T>
__device__ inline void accumulate_elements(T* sums, const T* grads, int n) {
  using V = Vector<T, width>;
  using Word = std::conditional_t<width == 1, V, Word16>;
  for (int i = threadIdx.x; within(i, n / width); i += threads) {
    const Word added = load_once(reinterpret_cast<const Word*>(grads) + i);
    if constexpr (first) {
      store(reinterpret_cast<Word*>(sums) + i, added);
    } else {
      V sum = bits_as<V>(load(reinterpret_cast<const Word*>(sums) + i));
      const V grad = bits_as<V>(added);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        sum.at[j] = narrowed<T>(widened(sum.at[j]) + widened(grad.at[j]));
      }
      store(reinterpret_cast<Word*>(sums) + i, bits_as<Word>(sum));
    }
  }
}

template <bool first>
__device__ inline void accumulate_chunk(const Chunk& chunk) {
  with_type(chunk.type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int width = 16 / sizeof(T);
    T* sums = reinterpret_cast<T*>(chunk.data);
    const T* grads = reinterpret_cast<const T*>(chunk.other);
    const bool aligned = (chunk.data | chunk.other) % 16 == 0;
    const int done = aligned ? chunk.size() / width * width : 0;
    accumulate_elements<first, width>(sums, grads, done);
    accumulate_elements<first, 1>(sums + done, grads + done, chunk.size() - done);
  });
}

// window: (seen, good, weight of the good).
__global__ __launch_bounds__(threads, blocks_per_sm) void accumulate_kernel(
    Plan plan, const int64_t* verdict, double* window, double weight) {
  const bool good = !skips(load(verdict));
  // Until a micro-batch is good the sums hold the gradients of a bad one.
  const bool first = load(window + 1) == 0.0;
  for (int c = blockIdx.x; good && c < plan.n_chunks; c += gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    first ? accumulate_chunk<true>(chunk) : accumulate_chunk<false>(chunk);
  }
  // The window is written when no thread of any block needs what it was.
  __syncthreads();
  if (arrives_last(plan.arrived + plan.tensors, gridDim.x) && threadIdx.x == 0) {
    store(window, load(window) + 1.0);
    store(window + 1, load(window + 1) + (good ? 1.0 : 0.0));
    store(window + 2, load(window + 2) + (good ? weight : 0.0));
  }
}

}  // namespace fastguard
