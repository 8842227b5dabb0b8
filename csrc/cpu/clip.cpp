// clip_: measures gradients, decides and scales them, in one.
// Reference: clip_ref_ in fastguard/ops/clip.py.

#include "checks.h"
#include "decide.h"
#include "decisions.h"
#include "grad_norm.h"
#include "scale.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_cpu(
    StableListHandle list, double max_norm, double skip_norm, bool float32_norm) {
  const TensorList grads(list);
  for (size_t i = 0; i < grads.size(); ++i) {
    check_no_overlap(grads[i], "clip_", i);
  }
  const auto [total_norm, norms, nonfinite] = grad_norm_cpu(grads);
  const double norm = as_returned(*total_norm.const_data_ptr<double>(), float32_norm);
  const auto [clip_coef, verdict] = tensors_of(decide(norm, max_norm, skip_norm));
  scale_cpu(grads, clip_coef);
  return {total_norm, norms, nonfinite, clip_coef, verdict};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) { m.impl("clip_", TORCH_BOX(&fastguard::clip_cpu)); }
