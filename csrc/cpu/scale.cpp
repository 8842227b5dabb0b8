// scale_: all gradients times one coefficient, or each times its own, in one parallel region. The
// products are computed in double: a coefficient of 1e-43 scales fp32 gradients of 1e38 to 1e-5
// without the loss of a bit. Reference: scale_ref_ in fastguard/ops/scale.py.

#include "scale.h"

#include "checks.h"
#include "gradients.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace fastguard {

using torch::stable::Tensor;

void scale_cpu(const TensorList& grads, const Tensor& clip_coef) {
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
  SpanList written(grads, true);
  const std::vector<Slice> slices = cut(written.spans);
  const GradientKernels& kernels = gradient_kernels();
  for_each_slice(slices, [&](int64_t s) {
    const Span& span = written.spans[slices[s].span];
    const double factor = factors[step * slices[s].span];
    if (factor != 1.0) {
      pick(kernels.scale, span.dtype)(data_of(span, slices[s]), slices[s].size, factor);
    }
  });
  written.copy_back();
}

namespace {

void scale_list(StableListHandle grads, const Tensor& clip_coef) {
  scale_cpu(TensorList(grads), clip_coef);
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("scale_", TORCH_BOX(&fastguard::scale_list));
}
