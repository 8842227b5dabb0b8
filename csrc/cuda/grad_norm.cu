// grad_norm and grad_norm_decide_ on CUDA.
#include "cuda/grad_norm.cuh"

#include "cuda/deciding.h"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Measured {
  explicit Measured(const Stream& on, int64_t n)
      : total_norm(on.empty({}, ScalarType::Double)),
        norms(on.empty({n}, ScalarType::Double)),
        nonfinite(on.empty({n, 3}, ScalarType::Long)) {}

  Norms out() const {
    return {
        total_norm.mutable_data_ptr<double>(),
        norms.mutable_data_ptr<double>(),
        nonfinite.mutable_data_ptr<int64_t>()};
  }

  Tensor total_norm, norms, nonfinite;
};

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

std::tuple<Tensor, Tensor, Tensor> grad_norm_cuda(const std::vector<Tensor>& grads) {
  const Stream on(grads.at(0));
  const Measured measured = measure(on, grads, "grad_norm", Deciding{});
  return {measured.total_norm, measured.norms, measured.nonfinite};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> grad_norm_decide_cuda(
    const std::vector<Tensor>& grads,
    const std::optional<Tensor>& unscale,
    const std::optional<Tensor>& loss,
    const Tensor& statistics,
    const Tensor& seen_norms,
    const Tensor& accepted_norms,
    const Tensor& per_tensor,
    int64_t step,
    int64_t threshold,
    double max_norm,
    double skip_norm,
    const std::vector<double>& options,
    const std::optional<Tensor>& scale,
    const std::optional<Tensor>& growth_tracker,
    const std::vector<double>& growth) {
  constexpr const char* op = "grad_norm_decide_";
  const int64_t n = static_cast<int64_t>(grads.size());
  check_guard_decide(
      op, n, unscale, loss, statistics, seen_norms, accepted_norms, per_tensor, threshold, options);
  check_growth(op, scale, growth_tracker, growth);
  const Stream on(statistics);
  const Decided decided(on, threshold, n);
  const Deciding deciding = deciding_of(
      on,
      op,
      unscale,
      loss,
      statistics,
      seen_norms,
      accepted_norms,
      per_tensor,
      step,
      policy_of(threshold, max_norm, skip_norm, options),
      scale,
      growth_tracker,
      growth_of(growth),
      decided);
  const Measured measured = measure(on, grads, op, deciding);
  return {
      measured.total_norm,
      measured.norms,
      measured.nonfinite,
      decided.grad_coef,
      decided.verdict,
      decided.record};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_cuda));
  m.impl("grad_norm_decide_", TORCH_BOX(&fastguard::grad_norm_decide_cuda));
}
