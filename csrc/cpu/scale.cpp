// scale_: all gradients times one coefficient, in one parallel region, computed in double (a
// coefficient of 1e-43 brings fp32 gradients of 1e38 down to 1e-5 without losing a bit).
// Reference: scale_ref_ in fastguard/ops.py.

#include "gradients.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void check_no_overlap(const Tensor& tensor, size_t index) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    STD_TORCH_CHECK(
        tensor.stride(dim) != 0 || tensor.size(dim) <= 1 || tensor.numel() == 0,
        "scale_: tensor ",
        index,
        " is expanded: several of its elements share a single memory location; clone it");
  }
}

void scale_cpu(const std::vector<Tensor>& grads, const Tensor& clip_coef) {
  STD_TORCH_CHECK(
      clip_coef.dim() == 0 && clip_coef.scalar_type() == ScalarType::Double,
      "scale_: clip_coef must be a float64 tensor of shape (), as decide returns it; got ",
      clip_coef.dim(),
      " dimensions and dtype number ",
      static_cast<int>(clip_coef.scalar_type()));
  const double factor = *clip_coef.const_data_ptr<double>();
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dtype(grads[i], "scale_", i);
    check_no_overlap(grads[i], i);
  }
  if (factor == 1.0) {
    return;  // nothing to write
  }
  std::vector<Dense> tensors;
  std::vector<Span> spans;
  tensors.reserve(grads.size());
  spans.reserve(grads.size());
  for (const Tensor& grad : grads) {
    tensors.push_back(densify(grad));
    tensors.back().tensor.mutable_data_ptr();  // makes a copy-on-write tensor its own
    spans.push_back(span_of(tensors.back().tensor));
  }
  const std::vector<Chunk> chunks = cut(spans);
  const GradientKernels& kernels = gradient_kernels();
  for_each_chunk(chunks, [&](int64_t c) {
    const Span& span = spans[chunks[c].span];
    pick(kernels.scale, span.dtype)(data_of(span, chunks[c]), chunks[c].size, factor);
  });
  for (size_t i = 0; i < grads.size(); ++i) {
    if (tensors[i].copied) {
      Tensor grad = grads[i];
      torch::stable::copy_(grad, tensors[i].tensor);
    }
  }
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("scale_", TORCH_BOX(&fastguard::scale_cpu));
}
