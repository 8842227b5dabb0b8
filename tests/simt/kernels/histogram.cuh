// How often each value occurs, the least and the greatest, by atomics.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

constexpr int bins = 16;

__global__ void histogram_kernel(
    const int* x, int64_t n, int* counts, double* sum, int* least, int* greatest, int* lock) {
  FASTGUARD_SHARED(int, mine, bins);
  if (threadIdx.x < bins) {
    mine[threadIdx.x] = 0;
  }
  __syncthreads();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (within(i, n)) {
    const int value = load(x + i);
    atomicAdd(&mine[value], 1);
    atomicAdd(sum, static_cast<double>(value));
    atomicMin(least, value);
    atomicMax(greatest, value);
  }
  __syncthreads();
  if (threadIdx.x < bins) {
    atomicAdd(counts + threadIdx.x, mine[threadIdx.x]);
  }
  if (threadIdx.x == 0 && atomicCAS(lock, 0, 1) == 0) {
    atomicExch(lock, 2);
  }
}

}  // namespace fastguard
