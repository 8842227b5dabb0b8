// clip_ on CUDA.
#include "cuda/clip.cuh"

#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_cuda(
    const std::vector<Tensor>& grads, double max_norm, double skip_norm, bool float32_norm) {
  const Stream on(grads.at(0));
  const NoGrad no_grad;
  PlanTensors dense(grads, on.device, "clip_", true);
  const int64_t n = static_cast<int64_t>(grads.size());
  const Tensor total_norm = on.empty({}, ScalarType::Double),
               norms = on.empty({n}, ScalarType::Double);
  const Tensor nonfinite = on.empty({n, 3}, ScalarType::Long);
  const Tensor clip_coef = on.empty({}, ScalarType::Double),
               verdict = on.empty({}, ScalarType::Long);
  const DevicePlan prepared = plan_of(on, dense.given);
  launch(
      on,
      clip_kernel,
      {blocks_for(on, clip_kernel, prepared.plan.n_chunks, kept_bytes), kept_bytes, true},
      prepared.plan,
      Norms{
          total_norm.mutable_data_ptr<double>(),
          norms.mutable_data_ptr<double>(),
          nonfinite.mutable_data_ptr<int64_t>()},
      Clipping{
          max_norm,
          skip_norm,
          float32_norm,
          clip_coef.mutable_data_ptr<double>(),
          verdict.mutable_data_ptr<int64_t>()});
  dense.copy_back();
  return {total_norm, norms, nonfinite, clip_coef, verdict};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("clip_", TORCH_BOX(&fastguard::clip_cuda));
}
