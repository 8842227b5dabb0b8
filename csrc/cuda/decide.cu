// decide and guard_decide_ on CUDA.
#include "cuda/decide.cuh"

#include "cuda/deciding.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> decide_cuda(
    const Tensor& total_norm, double max_norm, double skip_norm) {
  check_total_norm(total_norm);
  const Stream on(total_norm);
  const Tensor clip_coef = on.empty({}, ScalarType::Double);
  const Tensor verdict = on.empty({}, ScalarType::Long);
  launch(
      on,
      decide_kernel,
      {1},
      total_norm.const_data_ptr<double>(),
      max_norm,
      skip_norm,
      clip_coef.mutable_data_ptr<double>(),
      verdict.mutable_data_ptr<int64_t>());
  return {clip_coef, verdict};
}

std::tuple<Tensor, Tensor, Tensor> guard_decide_cuda(
    const Tensor& total_norm,
    const Tensor& norms,
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
    const std::vector<double>& options) {
  constexpr const char* op = "guard_decide_";
  check_measured(op, total_norm, norms);
  check_guard_decide(
      op,
      norms.numel(),
      unscale,
      loss,
      statistics,
      seen_norms,
      accepted_norms,
      per_tensor,
      threshold,
      options);
  const Stream on(total_norm);
  const Decided decided(on, threshold, norms.numel());
  check_on(on, norms, op, "norms");
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
      std::nullopt,
      std::nullopt,
      Growth{},
      decided);
  launch(
      on,
      guard_decide_kernel,
      {1},
      deciding,
      total_norm.const_data_ptr<double>(),
      norms.const_data_ptr<double>(),
      static_cast<int32_t>(norms.numel()));
  return {decided.grad_coef, decided.verdict, decided.record};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("decide", TORCH_BOX(&fastguard::decide_cuda));
  m.impl("guard_decide_", TORCH_BOX(&fastguard::guard_decide_cuda));
}
