// grad_norm: global L2 norm, norm of every tensor, the counts of its NaNs and Infs and the index of
// the first one, from one read of the tensors in one parallel region. Reference: grad_norm_ref in
// fastguard/ops/grad_norm.py.
//
// The tensors are cut into slices of fixed size, and every slice's sum has its place in an array.
// The result therefore does not depend on the threads.

#include "grad_norm.h"

#include "checks.h"
#include "gradients.h"
#include "nonfinite.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

using Permutation = std::vector<PermutedDim>;

int64_t row_major_index(const Permutation& permutation, int64_t offset) {
  const int dims = static_cast<int>(permutation.size());
  const auto read = [](const int64_t* number) { return *number; };
  return row_major_index(permutation.data(), 0, dims, offset, read);
}

template <class Bits>
Nonfinite find_nonfinite(
    const Permutation& permutation, const Bits* x, const Slice& slice, Bits exponent) {
  Nonfinite found;
  for (int64_t i = 0; i < slice.size; ++i) {
    if ((x[i] & exponent) == exponent) {
      const bool inf = static_cast<Bits>(x[i] << 1) == static_cast<Bits>(exponent << 1);
      found = together(found, {!inf, inf, row_major_index(permutation, slice.begin + i)});
    }
  }
  return found;
}

// Only called for a slice whose sum is not finite; it is in the cache.
Nonfinite find_nonfinite(const Permutation& order, const Span& span, const Slice& slice) {
  const void* x = data_of(span, slice);
  switch (span.dtype) {
    case ScalarType::Double:
      return find_nonfinite(order, static_cast<const uint64_t*>(x), slice, uint64_t{0x7ff} << 52);
    case ScalarType::Float:
      return find_nonfinite(order, static_cast<const uint32_t*>(x), slice, uint32_t{0x7f800000});
    case ScalarType::BFloat16:
      return find_nonfinite(order, static_cast<const uint16_t*>(x), slice, uint16_t{0x7f80});
    default:
      return find_nonfinite(order, static_cast<const uint16_t*>(x), slice, uint16_t{0x7c00});
  }
}

std::tuple<Tensor, Tensor, Tensor> reduce(
    size_t tensors,
    const std::vector<Slice>& slices,
    const std::vector<double>& sums,
    const std::vector<Nonfinite>& nonfinite) {
  const int64_t n = static_cast<int64_t>(tensors);
  Tensor total_norm = torch::stable::empty({}, ScalarType::Double);
  Tensor norms = torch::stable::empty({n}, ScalarType::Double);
  Tensor places = torch::stable::empty({n, 3}, ScalarType::Long);
  double* norm = norms.mutable_data_ptr<double>();
  std::fill_n(norm, n, 0.0);
  std::vector<Nonfinite> per_tensor(tensors);
  for (size_t s = 0; s < slices.size(); ++s) {
    norm[slices[s].span] += sums[s];
    Nonfinite& of_tensor = per_tensor[slices[s].span];
    of_tensor = together(of_tensor, nonfinite[s]);
  }
  double total = 0.0;
  int64_t* place = places.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < n; ++t) {
    total += norm[t];
    norm[t] = std::sqrt(norm[t]);
    *place++ = per_tensor[t].nans;
    *place++ = per_tensor[t].infs;
    *place++ = per_tensor[t].first;
  }
  *total_norm.mutable_data_ptr<double>() = std::sqrt(total);
  return {total_norm, norms, places};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> grad_norm_cpu(const TensorList& grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dtype(grads[i], "grad_norm", i);
  }
  const SpanList tensors(grads, false);
  const std::vector<Slice> slices = cut(tensors.spans);
  std::vector<double> sums(slices.size());
  std::vector<Nonfinite> nonfinite(slices.size());
  const GradientKernels& kernels = gradient_kernels();
  for_each_slice(slices, [&](int64_t s) {
    const Slice& slice = slices[s];
    const Span& span = tensors.spans[slice.span];
    sums[s] = pick(kernels.sum_squares, span.dtype)(data_of(span, slice), slice.size);
    if (!std::isfinite(sums[s])) {
      nonfinite[s] = find_nonfinite(tensors.permutation(slice.span), span, slice);
    }
  });
  return reduce(grads.size(), slices, sums, nonfinite);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> grad_norm_of_list(StableListHandle grads) {
  return grad_norm_cpu(TensorList(grads));
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_of_list));
}
