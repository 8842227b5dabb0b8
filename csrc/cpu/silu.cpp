// silu and silu_backward. References: fastguard/ops/silu.py.

#include "frames.h"
#include "silu_kernel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace fastguard {
namespace {

using torch::stable::Tensor;

// Calls work(first element, number of elements) for slices of a tensor.
template <class Work>
void for_each_slice_of(int64_t elements, const Work& work) {
  const int64_t slices = (elements + slice_elements - 1) / slice_elements;
  for_each_part(slices, elements, [&](int64_t i) {
    work(i * slice_elements, std::min(slice_elements, elements - i * slice_elements));
  });
}

Tensor silu_cpu(const Tensor& x) {
  check_dtype(x, "silu", 0);
  const Tensor from = torch::stable::contiguous(x);
  const Tensor output = torch::stable::empty_like(from);
  auto* const kernel = pick(FASTGUARD_BEST_OF(silu_kernels).forward, x.scalar_type());
  const auto* const source = static_cast<const char*>(from.const_data_ptr());
  auto* const target = static_cast<char*>(output.mutable_data_ptr());
  const auto size = static_cast<int64_t>(x.element_size());
  for_each_slice_of(x.numel(), [&](int64_t first, int64_t n) {
    kernel(source + first * size, target + first * size, n);
  });
  return output;
}

Tensor silu_backward_cpu(const Tensor& grad_output, const Tensor& x) {
  check_dtype(x, "silu_backward", 0);
  check_dtype(grad_output, "silu_backward", 1);
  STD_TORCH_CHECK(
      grad_output.scalar_type() == x.scalar_type() && grad_output.sizes().equals(x.sizes()),
      "silu_backward: grad_output must have x's shape and dtype");
  const Tensor grad = torch::stable::contiguous(grad_output), from = torch::stable::contiguous(x);
  const Tensor grad_x = torch::stable::empty_like(from);
  auto* const kernel = pick(FASTGUARD_BEST_OF(silu_kernels).backward, x.scalar_type());
  const auto* const upstream = static_cast<const char*>(grad.const_data_ptr());
  const auto* const source = static_cast<const char*>(from.const_data_ptr());
  auto* const target = static_cast<char*>(grad_x.mutable_data_ptr());
  const auto size = static_cast<int64_t>(x.element_size());
  for_each_slice_of(x.numel(), [&](int64_t first, int64_t n) {
    kernel(upstream + first * size, source + first * size, target + first * size, n);
  });
  return grad_x;
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("silu", TORCH_BOX(&fastguard::silu_cpu));
  m.impl("silu_backward", TORCH_BOX(&fastguard::silu_backward_cpu));
}
