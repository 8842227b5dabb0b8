// What the lanes of one warp tell one another.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

// Each warp turns its 32 values round, through shared memory that it alone uses.
__global__ void reverse_kernel(const float* from, float* to) {
  const Shared<float> mine = dynamic_shared<float>() + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  mine[lane] = load(from + threadIdx.x);
  __syncwarp();
  store<float>(to + threadIdx.x, mine[31 - lane]);
}

// One row of 32 for each kind of shuffle, then one for the votes on value % 2.
__global__ void shuffle_kernel(const int64_t* values, int argument, int width, int64_t* out) {
  constexpr unsigned all = 0xffffffffu;
  const unsigned lane = threadIdx.x;
  const long long value = load(values + lane);
  store<int64_t>(out + lane, __shfl_sync(all, value, argument, width));
  store<int64_t>(out + 32 + lane, __shfl_xor_sync(all, value, argument, width));
  store<int64_t>(out + 64 + lane, __shfl_down_sync(all, value, argument, width));
  const bool odd = value % 2 != 0;
  const int64_t votes = int64_t{__ballot_sync(all, odd)} * 4 + (__any_sync(all, odd) ? 2 : 0) +
      (__all_sync(all, odd) ? 1 : 0);
  store(out + 96 + lane, votes);
}

}  // namespace fastguard
