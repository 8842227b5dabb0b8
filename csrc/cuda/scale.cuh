// scale_. Reference: scale_ref_ in fastguard/ops/scale.py.
#pragma once

#include "cuda/times.cuh"

namespace fastguard {

// next_coef: 0 if all tensors have the same coefficient, else 1.
__global__ __launch_bounds__(threads, blocks_per_sm) void scale_kernel(
    Plan plan, const double* clip_coef, int32_t next_coef) {
  for (int c = blockIdx.x; c < plan.n_chunks; c += gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    const double factor = load(clip_coef + int64_t{next_coef} * chunk.tensor);
    if (factor == 1.0) {
      continue;
    }
    with_type(chunk.type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* x = reinterpret_cast<T*>(chunk.data);
      scale_elements(x, chunk.size(), factor, [](int, const Word16* at) { return load(at); });
    });
  }
}

}  // namespace fastguard
