#include "gradients.h"

#include "capability.h"

#include <numeric>
#include <utility>

namespace fastguard {
namespace {

using torch::stable::Tensor;

std::vector<int64_t> dims_by_stride(const Tensor& tensor) {
  std::vector<int64_t> dims(tensor.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) {
    return tensor.stride(a) > tensor.stride(b);
  });
  return dims;
}

// The dimensions of a transposed or channels-last tensor, whose memory can be read straight
// through; nothing for a tensor with gaps or overlaps.
std::vector<Dense::Dim> permutation_of(const Tensor& tensor) {
  std::vector<int64_t> row_major(tensor.dim(), 1);
  for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
    row_major[dim] = row_major[dim + 1] * tensor.size(dim + 1);
  }
  const std::vector<int64_t> dims = dims_by_stride(tensor);
  std::vector<Dense::Dim> permutation;
  int64_t inner = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (tensor.size(*dim) == 1) {
      continue;
    }
    if (tensor.stride(*dim) != inner) {
      return {};
    }
    inner *= tensor.size(*dim);
    permutation.insert(permutation.begin(), {tensor.stride(*dim), row_major[*dim]});
  }
  return permutation;
}

}  // namespace

Dense densify(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return {tensor, {}, false};
  }
  std::vector<Dense::Dim> permutation = permutation_of(tensor);
  if (!permutation.empty()) {
    return {tensor, std::move(permutation), false};
  }
  return {torch::stable::contiguous(tensor), {}, true};
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
