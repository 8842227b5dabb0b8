// grad_norm on CUDA.
#include "cuda/grad_norm.cuh"

#include "cuda/measured.h"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {

using torch::stable::Tensor;

Measured measure(
    const Stream& on, const std::vector<Tensor>& grads, const char* op, const Deciding& deciding) {
  const PlanTensors dense(grads, on.device, op, false);
  const Measured measured(on, static_cast<int64_t>(grads.size()));
  const DevicePlan prepared = plan_of(on, dense.given);
  launch(
      on,
      grad_norm_kernel,
      {blocks_for(on, grad_norm_kernel, prepared.plan.n_chunks)},
      prepared.plan,
      measured.out(),
      deciding);
  return measured;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> grad_norm_cuda(const std::vector<Tensor>& grads) {
  const Stream on(grads.at(0));
  const Measured measured = measure(on, grads, "grad_norm", Deciding{});
  return {measured.total_norm, measured.norms, measured.nonfinite};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_cuda));
}
