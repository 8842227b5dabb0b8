// scale_: all gradients times one coefficient, or each times its own, in one parallel region,
// computed in double: a coefficient of 1e-43 brings fp32 gradients of 1e38 down to 1e-5 without
// losing a bit. clip_: norm, decision and this in one.
// References: scale_ref_ in fastguard/ops/scale.py, clip_ref_ in fastguard/ops/clip.py.

#include "checks.h"
#include "decide.h"
#include "grad_norm.h"
#include "gradients.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void scale_cpu(const std::vector<Tensor>& grads, const Tensor& clip_coef) {
  check_coef(clip_coef, "scale_", "clip_coef", static_cast<int64_t>(grads.size()));
  const double* const factors = clip_coef.const_data_ptr<double>();
  const size_t step = clip_coef.dim();  // 0: the same factor for all
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dtype(grads[i], "scale_", i);
    check_no_overlap(grads[i], "scale_", i);
  }
  if (std::all_of(factors, factors + clip_coef.numel(), [](double f) { return f == 1.0; })) {
    return;  // nothing to write
  }
  const NoGrad no_grad;
  Written written(grads);
  const std::vector<Chunk> chunks = cut(written.spans);
  const GradientKernels& kernels = gradient_kernels();
  for_each_chunk(chunks, [&](int64_t c) {
    const Span& span = written.spans[chunks[c].span];
    const double factor = factors[step * chunks[c].span];
    if (factor != 1.0) {
      pick(kernels.scale, span.dtype)(data_of(span, chunks[c]), chunks[c].size, factor);
    }
  });
  written.copy_back();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> clip_cpu(
    const std::vector<Tensor>& grads, double max_norm, double skip_norm, bool float32_norm) {
  for (size_t i = 0; i < grads.size(); ++i) {
    check_no_overlap(grads[i], "clip_", i);
  }
  const auto [total_norm, norms, nonfinite] = grad_norm_cpu(grads);
  const double norm = as_returned(*total_norm.const_data_ptr<double>(), float32_norm);
  const Decision decision = decide(norm, max_norm, skip_norm);
  Tensor clip_coef = torch::stable::empty({}, ScalarType::Double);
  Tensor verdict = torch::stable::empty({}, ScalarType::Long);
  *clip_coef.mutable_data_ptr<double>() = decision.clip_coef;
  *verdict.mutable_data_ptr<int64_t>() = static_cast<int64_t>(decision.verdict);
  scale_cpu(grads, clip_coef);
  return {total_norm, norms, nonfinite, clip_coef, verdict};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("scale_", TORCH_BOX(&fastguard::scale_cpu));
  m.impl("clip_", TORCH_BOX(&fastguard::clip_cpu));
}
