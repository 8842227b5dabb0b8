// The sum of n floats in one launch: lanes by shuffles, warps through shared memory, blocks by the
// one that ends last.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

constexpr int reduce_threads = 128;

__device__ inline double warp_sum(double x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  }
  return x;
}

// In thread 0. A barrier must lie between two calls.
__device__ inline double block_sum(double x) {
  FASTGUARD_SHARED(double, of_warp, reduce_threads / 32);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = x;
  }
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; threadIdx.x == 0 && warp < reduce_threads / 32; ++warp) {
    sum += of_warp[warp];
  }
  return sum;
}

__global__ void __launch_bounds__(reduce_threads)
    reduce_kernel(const float* x, int64_t n, double* partial, unsigned* ended, double* sum) {
  FASTGUARD_SHARED(unsigned, rank, 1);
  double mine = 0.0;
  const int64_t stride = int64_t{gridDim.x} * reduce_threads;
  for (int64_t i = int64_t{blockIdx.x} * reduce_threads + threadIdx.x; within(i, n); i += stride) {
    mine += load_once(x + i);
  }
  mine = block_sum(mine);
  if (threadIdx.x == 0) {
    store(partial + blockIdx.x, mine);
    __threadfence();
    rank[0] = atomicAdd(ended, 1u);
  }
  __syncthreads();
  if (rank[0] + 1 < gridDim.x) {
    return;
  }
  __threadfence();
  const bool mine_exists = within(threadIdx.x, gridDim.x);
  const double total = block_sum(mine_exists ? load(partial + threadIdx.x) : 0.0);
  if (threadIdx.x == 0) {
    store(sum, total);
  }
}

}  // namespace fastguard
