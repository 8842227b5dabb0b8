// grad_norm_decide_ on CUDA: the last block of grad_norm's kernel decides.
#include "cuda/deciding.h"
#include "cuda/measured.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

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
  m.impl("grad_norm_decide_", TORCH_BOX(&fastguard::grad_norm_decide_cuda));
}
