// Divides x by its sum: a cooperative launch, in which every block needs what the others found.
#pragma once

#include "simt/kernels/reduce.cuh"

namespace fastguard {

__global__ void __launch_bounds__(reduce_threads)
    normalise_kernel(float* x, int64_t n, double* partial) {
  FASTGUARD_SHARED(double, total, 1);
  const int64_t first = int64_t{blockIdx.x} * reduce_threads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * reduce_threads;
  double mine = 0.0;
  for (int64_t i = first; within(i, n); i += stride) {
    mine += load(x + i);
  }
  mine = block_sum(mine);
  if (threadIdx.x == 0) {
    store(partial + blockIdx.x, mine);
  }
  grid_sync();
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (int block = 0; within(block, gridDim.x); ++block) {
      sum += load(partial + block);
    }
    total[0] = sum;
  }
  __syncthreads();
  for (int64_t i = first; within(i, n); i += stride) {
    store(x + i, static_cast<float>(load(x + i) / total[0]));
  }
}

}  // namespace fastguard
