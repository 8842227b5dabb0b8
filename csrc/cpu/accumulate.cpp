// accumulate_: adds one micro-batch's gradients to the sums, unless its verdict is a skip.
// Reference: accumulate_ref_ in fastguard/ops/accumulate.py.

#include "checks.h"
#include "decide.h"
#include "gradients.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void accumulate_cpu(
    StableListHandle sum_list,
    StableListHandle grad_list,
    const Tensor& verdict,
    Tensor window,
    double weight) {
  const TensorList sums(sum_list);
  const TensorList grads(grad_list);
  check_accumulate(sums, grads, verdict, window);
  const NoGrad no_grad;
  double* const micro_batches =
      window.mutable_data_ptr<double>();  // number, number of good ones, weight of the good ones
  if (skips(*verdict.const_data_ptr<int64_t>())) {
    micro_batches[0] += 1.0;
    return;
  }
  SpanList written(sums, true);
  std::vector<Tensor> copies;
  std::vector<Span> from;
  from.reserve(sums.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i].is_contiguous() && grads[i].is_contiguous()) {
      from.push_back(span_of(grads[i]));
    } else {
      copies.push_back(laid_out_as(grads[i].tensor(), written.tensor(i)));
      from.push_back(span_of(copies.back()));
    }
  }
  const std::vector<Slice> slices = cut(written.spans);
  const GradientKernels& kernels = gradient_kernels();
  // Nothing was written so far, and nothing throws from here on.
  micro_batches[0] += 1.0;
  micro_batches[1] += 1.0;
  micro_batches[2] += weight;
  for_each_slice(slices, [&](int64_t s) {
    const Slice& slice = slices[s];
    const Span& grad = from[slice.span];
    pick(kernels.add, grad.dtype)(
        data_of(written.spans[slice.span], slice), data_of(grad, slice), slice.size);
  });
  written.copy_back();
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&fastguard::accumulate_cpu));
}
