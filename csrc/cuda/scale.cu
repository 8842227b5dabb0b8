// scale_ on CUDA.
#include "cuda/scale.cuh"

#include "checks.h"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void scale_cuda(const std::vector<Tensor>& grads, const Tensor& clip_coef) {
  check_coef(clip_coef, "scale_", "clip_coef", static_cast<int64_t>(grads.size()));
  if (grads.empty()) {
    return;
  }
  const Stream on(grads[0]);
  const NoGrad no_grad;
  check_on(on, clip_coef, "scale_", "clip_coef");
  PlanTensors dense(grads, on.device, "scale_", true);
  const DevicePlan prepared = plan_of(on, dense.given);
  launch(
      on,
      scale_kernel,
      {blocks_for(on, scale_kernel, prepared.plan.n_chunks)},
      prepared.plan,
      clip_coef.const_data_ptr<double>(),
      static_cast<int32_t>(clip_coef.dim()));
  dense.copy_back();
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("scale_", TORCH_BOX(&fastguard::scale_cuda));
}
