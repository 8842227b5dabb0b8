// settle_: on a skip the buffers are set back to their saved copies, otherwise the copies are
// brought up to date. As bytes, whatever their dtype. Reference: settle_ref_ in fastguard/ops.py.
#pragma once

#include "cuda/plan.cuh"
#include "decide.h"

namespace fastguard {

template <class Unit>
__device__ inline void copy_units(uint64_t to, uint64_t from, int n) {
  for (int i = threadIdx.x; within(i, n); i += threads) {
    store(reinterpret_cast<Unit*>(to) + i, load(reinterpret_cast<const Unit*>(from) + i));
  }
}

__global__ __launch_bounds__(threads) void settle_kernel(Plan plan, const int64_t* verdict) {
  const bool restore = skips(load(verdict));
  for (int c = blockIdx.x; c < plan.n_chunks; c += gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    const uint64_t to = restore ? chunk.data : chunk.other;
    const uint64_t from = restore ? chunk.other : chunk.data;
    const int whole = (to | from) % 16 == 0 ? chunk.size() / 16 : 0;
    copy_units<Word16>(to, from, whole);
    copy_units<uint8_t>(to + 16 * whole, from + 16 * whole, chunk.size() - 16 * whole);
  }
}

}  // namespace fastguard
