// grad_norm, and grad_norm_decide_: one launch, whose last block to finish decides.
// References: fastguard/ops/grad_norm.py and fastguard/ops/decide.py.
#pragma once

#include "cuda/judge.cuh"
#include "cuda/measure.cuh"

namespace fastguard {

// `deciding` may say that there is nothing to decide.
__global__ __launch_bounds__(threads, blocks_per_sm) void grad_norm_kernel(
    Plan plan, Norms out, Deciding deciding) {
  const auto look_away = [](int, const auto&) {};
  for (int c = blockIdx.x; c < plan.n_chunks; c += gridDim.x) {
    measure_chunk(plan, out, c, load_chunk(plan.chunks + c), look_away);
  }
  double total_norm;
  if (finish(plan, out, total_norm) && deciding.wanted()) {
    decide_in_block(deciding, total_norm, out.norms, plan.tensors);
  }
}

}  // namespace fastguard
