// Communication between the threads of a block, and between the blocks of a launch. The order of
// every sum depends only on the number of threads, which is a constant.
#pragma once

#include "cuda/plan.cuh"

namespace fastguard {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// An associative `combine` over all threads of the block. Every thread gets the result.
template <class T, class Combine>
__device__ inline T block_reduce(T x, const Combine& combine) {
  FASTGUARD_SHARED(T, of_warp, threads / warp_size);
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    x = combine(x, __shfl_xor_sync(all_lanes, x, distance));
  }
  if (threadIdx.x % warp_size == 0) {
    of_warp[threadIdx.x / warp_size] = x;
  }
  __syncthreads();
  T result = of_warp[0];
  for (int warp = 1; warp < threads / warp_size; ++warp) {
    result = combine(result, static_cast<T>(of_warp[warp]));
  }
  __syncthreads();  // the next call writes of_warp
  return result;
}

__device__ inline double block_sum(double x) {
  return block_reduce(x, [](double a, double b) { return a + b; });
}

// Whether this block is the last of `expected` blocks at the counter. The last block sets the
// counter to 0. It can read what thread 0 of each other block wrote before its arrival, and what
// that block wrote before a barrier.
__device__ inline bool arrives_last(unsigned* counter, unsigned expected) {
  FASTGUARD_SHARED(int, is_last, 1);
  if (threadIdx.x == 0) {
    __threadfence();  // writes of this block come before the arrival
    const bool last = atomicAdd(counter, 1u) == expected - 1;
    if (last) {
      __threadfence();  // reads of this block come after all arrivals
      store(counter, 0u);
    }
    is_last[0] = last;
  }
  __syncthreads();
  const bool last = is_last[0];
  __syncthreads();  // the next call writes is_last
  return last;
}

}  // namespace fastguard
