// accumulate_ on CUDA.
#include "cuda/accumulate.cuh"

#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void accumulate_cuda(
    const std::vector<Tensor>& sums,
    const std::vector<Tensor>& grads,
    const Tensor& verdict,
    Tensor window,
    double weight) {
  check_accumulate(sums, grads, verdict, window);
  const Stream on(window);
  const NoGrad no_grad;
  check_on(on, verdict, "accumulate_", "verdict");
  PlanTensors dense(sums, on.device, "accumulate_", true);
  check_devices(grads, on.device, "accumulate_");
  std::vector<Tensor> sources;
  for (size_t i = 0; i < grads.size(); ++i) {
    sources.push_back(laid_out_as(grads[i], dense[i].tensor));
    dense.given[i].other = sources.back().const_data_ptr();
    dense.given[i].other_type = type_of(sources.back().scalar_type());
  }
  const DevicePlan prepared = plan_of(on, dense.given);
  launch(
      on,
      accumulate_kernel,
      {blocks_for(on, accumulate_kernel, prepared.plan.n_chunks)},
      prepared.plan,
      verdict.const_data_ptr<int64_t>(),
      window.mutable_data_ptr<double>(),
      weight);
  dense.copy_back();
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("accumulate_", TORCH_BOX(&fastguard::accumulate_cuda));
}
