#include "gradients.h"

#include "capability.h"

#include <numeric>

namespace fastguard {
namespace {

using torch::stable::Tensor;

// Transposed and channels-last tensors are: their memory can be read straight through.
bool is_permuted_dense(const Tensor& tensor) {
  const std::vector<int64_t> dims = dims_by_stride(tensor);
  int64_t expected = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (tensor.size(*dim) == 1) {
      continue;
    }
    if (tensor.stride(*dim) != expected) {
      return false;
    }
    expected *= tensor.size(*dim);
  }
  return true;
}

}  // namespace

std::vector<int64_t> dims_by_stride(const Tensor& tensor) {
  std::vector<int64_t> dims(tensor.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) {
    return tensor.stride(a) > tensor.stride(b);
  });
  return dims;
}

Dense densify(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return {tensor, true, false};
  }
  if (is_permuted_dense(tensor)) {
    return {tensor, false, false};
  }
  return {torch::stable::contiguous(tensor), true, true};
}

const GradientKernels& gradient_kernels() {
  switch (cpu_capability()) {
#ifdef FASTGUARD_HAS_AVX512
    case Capability::avx512:
      return gradient_kernels_avx512;
#endif
#ifdef FASTGUARD_HAS_AVX2
    case Capability::avx2:
      return gradient_kernels_avx2;
#endif
    default:
      return gradient_kernels_default;
  }
}

}  // namespace fastguard
