// grad_norm: global L2 norm, norm of every tensor, the counts of its NaNs and Infs and the index of
// the first one, from one read of the tensors in one parallel region. Reference: grad_norm_ref in
// fastguard/ops/grad_norm.py.
//
// The tensors are cut into slices of fixed size, and every slice's sum has its place in an array.
// The result therefore does not depend on the threads.

#include "grad_norm.h"

#include "checks.h"
#include "gradients.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

constexpr int64_t nowhere = -1;

struct Nonfinite {
  int64_t nans = 0;
  int64_t infs = 0;
  int64_t first = nowhere;  // flat index in row-major order

  void add(const Nonfinite& other) {
    nans += other.nans;
    infs += other.infs;
    if (first == nowhere || (other.first != nowhere && other.first < first)) {
      first = other.first;
    }
  }
};

// Row-major index of the element that lies `offset` elements into a dense tensor.
int64_t row_major_index(const Dense& dense, int64_t offset) {
  if (dense.permutation.empty()) {
    return offset;
  }
  int64_t index = 0;
  for (const Dense::Dim& dim : dense.permutation) {
    index += offset / dim.stride * dim.row_major_stride;
    offset %= dim.stride;
  }
  return index;
}

template <class Bits>
Nonfinite find_nonfinite(const Dense& dense, const Bits* x, const Chunk& chunk, Bits exponent) {
  Nonfinite found;
  for (int64_t i = 0; i < chunk.size; ++i) {
    if ((x[i] & exponent) == exponent) {
      const bool inf = static_cast<Bits>(x[i] << 1) == static_cast<Bits>(exponent << 1);
      found.add({!inf, inf, row_major_index(dense, chunk.begin + i)});
    }
  }
  return found;
}

// Only called for a slice whose sum is not finite; it is in the cache.
Nonfinite find_nonfinite(const Dense& dense, const Span& span, const Chunk& chunk) {
  const void* x = data_of(span, chunk);
  switch (span.dtype) {
    case ScalarType::Double:
      return find_nonfinite(dense, static_cast<const uint64_t*>(x), chunk, uint64_t{0x7ff} << 52);
    case ScalarType::Float:
      return find_nonfinite(dense, static_cast<const uint32_t*>(x), chunk, uint32_t{0x7f800000});
    case ScalarType::BFloat16:
      return find_nonfinite(dense, static_cast<const uint16_t*>(x), chunk, uint16_t{0x7f80});
    default:
      return find_nonfinite(dense, static_cast<const uint16_t*>(x), chunk, uint16_t{0x7c00});
  }
}

std::tuple<Tensor, Tensor, Tensor> reduce(
    size_t tensors,
    const std::vector<Chunk>& chunks,
    const std::vector<double>& sums,
    const std::vector<Nonfinite>& nonfinite) {
  const int64_t n = static_cast<int64_t>(tensors);
  Tensor total_norm = torch::stable::empty({}, ScalarType::Double);
  Tensor norms = torch::stable::empty({n}, ScalarType::Double);
  Tensor places = torch::stable::empty({n, 3}, ScalarType::Long);
  double* norm = norms.mutable_data_ptr<double>();
  std::fill_n(norm, n, 0.0);
  std::vector<Nonfinite> per_tensor(tensors);
  for (size_t c = 0; c < chunks.size(); ++c) {
    norm[chunks[c].span] += sums[c];
    per_tensor[chunks[c].span].add(nonfinite[c]);
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

std::tuple<Tensor, Tensor, Tensor> grad_norm_cpu(const std::vector<Tensor>& grads) {
  std::vector<Dense> tensors;
  std::vector<Span> spans;
  tensors.reserve(grads.size());
  spans.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    check_dtype(grads[i], "grad_norm", i);
    tensors.push_back(densify(grads[i]));
    spans.push_back(span_of(tensors.back().tensor));
  }
  const std::vector<Chunk> chunks = cut(spans);
  std::vector<double> sums(chunks.size());
  std::vector<Nonfinite> nonfinite(chunks.size());
  const GradientKernels& kernels = gradient_kernels();
  for_each_chunk(chunks, [&](int64_t c) {
    const Chunk& chunk = chunks[c];
    const Span& span = spans[chunk.span];
    sums[c] = pick(kernels.sum_squares, span.dtype)(data_of(span, chunk), chunk.size);
    if (!std::isfinite(sums[c])) {
      nonfinite[c] = find_nonfinite(tensors[chunk.span], span, chunk);
    }
  });
  return reduce(grads.size(), chunks, sums, nonfinite);
}

}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_cpu));
}
