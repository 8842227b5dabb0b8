// grad_norm: global L2 norm, norm of every tensor, count and place of the non-finite elements, from
// one read of the tensors in one parallel region. Reference: grad_norm_ref in fastguard/ops.py.
//
// The tensors are cut into chunks of fixed size and every chunk's sum has its place in an array, so
// the result does not depend on which thread took which chunk, nor on how many threads there are.

#include "gradients.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

constexpr int64_t nowhere = -1;

struct Nonfinite {
  int64_t count = 0;
  int64_t first = nowhere;  // flat index in row-major order
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
      const int64_t index = row_major_index(dense, chunk.begin + i);
      found.first = found.count == 0 ? index : std::min(found.first, index);
      ++found.count;
    }
  }
  return found;
}

// Only called for a chunk whose sum is not finite, which lies in the cache then.
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

std::tuple<Tensor, Tensor, Tensor, Tensor> reduce(
    size_t tensors,
    const std::vector<Chunk>& chunks,
    const std::vector<double>& sums,
    const std::vector<Nonfinite>& nonfinite) {
  const int64_t n = static_cast<int64_t>(tensors);
  Tensor total_norm = torch::stable::empty({}, ScalarType::Double);
  Tensor norms = torch::stable::empty({n}, ScalarType::Double);
  Tensor counts = torch::stable::empty({n}, ScalarType::Long);
  Tensor first = torch::stable::empty({2}, ScalarType::Long);
  double* norm = norms.mutable_data_ptr<double>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* place = first.mutable_data_ptr<int64_t>();
  std::fill_n(norm, n, 0.0);
  std::fill_n(count, n, 0);
  std::fill_n(place, 2, nowhere);
  for (size_t c = 0; c < chunks.size(); ++c) {
    const int64_t t = static_cast<int64_t>(chunks[c].span);
    norm[t] += sums[c];
    count[t] += nonfinite[c].count;
    if (nonfinite[c].count == 0 || (place[0] != nowhere && place[0] != t)) {
      continue;
    }
    place[1] = place[0] == nowhere ? nonfinite[c].first : std::min(place[1], nonfinite[c].first);
    place[0] = t;
  }
  double total = 0.0;
  for (int64_t t = 0; t < n; ++t) {
    total += norm[t];
    norm[t] = std::sqrt(norm[t]);
  }
  *total_norm.mutable_data_ptr<double>() = std::sqrt(total);
  return {total_norm, norms, counts, first};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grad_norm_cpu(const std::vector<Tensor>& grads) {
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

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_cpu));
}
