// Copies whose requests are known: the counts of the executor are held against them.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

template <int n>
__global__ void copy_kernel(const float* from, float* to, int64_t count, int stride) {
  using V = Vector<float, n>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (within(i, count)) {
    const V values = load(reinterpret_cast<const V*>(from + i * stride));
    store(reinterpret_cast<V*>(to + i * n), values);
  }
}

// Word i * stride of shared memory for lane i.
template <int n>
__global__ void stride_kernel(float* out, int stride) {
  using V = Vector<float, n>;
  const Shared<V> staged = dynamic_shared<V>();
  staged[threadIdx.x * stride] = V{};
  __syncwarp();
  const V values = staged[threadIdx.x * stride];
  store(out + threadIdx.x, values.at[0]);
}

}  // namespace fastguard
