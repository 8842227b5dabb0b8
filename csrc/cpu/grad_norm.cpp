// grad_norm: global L2 norm, norm of every tensor, count and place of the non-finite elements, from
// one read of the tensors in one parallel region. Reference: grad_norm_ref in fastguard/ops.py.
//
// The tensors are cut into chunks of fixed size and every chunk's sum has its place in an array, so
// the result does not depend on which thread took which chunk, nor on how many threads there are.

#include "capability.h"
#include "grad_norm_kernel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t chunk_elements = 16384;  // 64 KiB of fp32: a bad chunk is looked at again in L2
constexpr int64_t serial_elements = 32768;  // below this a parallel region costs more than it saves
constexpr int64_t nowhere = -1;

// A tensor whose elements fill one stretch of memory, in whatever order.
struct Dense {
  Tensor owner;  // keeps a copy alive that was made of a strided tensor
  const char* data;
  int64_t numel;
  ScalarType dtype;
  bool contiguous;
};

struct Chunk {
  int64_t tensor;
  int64_t begin;  // in elements, in memory order
  int64_t size;
};

struct Nonfinite {
  int64_t count = 0;
  int64_t first = nowhere;  // flat index in row-major order
};

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

std::vector<int64_t> dims_by_stride(const Tensor& tensor) {
  std::vector<int64_t> dims(tensor.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) {
    return tensor.stride(a) > tensor.stride(b);
  });
  return dims;
}

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

Dense densify(const Tensor& tensor, size_t index) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "grad_norm: tensor ",
      index,
      " has dtype number ",
      static_cast<int>(dtype),
      "; float32, float64, bfloat16 and float16 are supported");
  STD_TORCH_CHECK(
      tensor.is_cpu(), "grad_norm: tensor ", index, " is not on the CPU like the first; call once per device");
  const bool contiguous = tensor.is_contiguous();
  const bool readable = contiguous || is_permuted_dense(tensor);
  const Tensor owner = readable ? tensor : torch::stable::contiguous(tensor);
  return {owner, static_cast<const char*>(owner.const_data_ptr()), owner.numel(), dtype,
          contiguous || !readable};
}

std::vector<Chunk> cut(const std::vector<Dense>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].numel; begin += chunk_elements) {
      const int64_t size = std::min(chunk_elements, tensors[t].numel - begin);
      chunks.push_back({static_cast<int64_t>(t), begin, size});
    }
  }
  return chunks;
}

// The chunk at `memory offset` of a permuted tensor lies at this row-major index.
int64_t row_major_index(const Tensor& tensor, int64_t offset) {
  std::vector<int64_t> coordinates(tensor.dim(), 0);
  for (const int64_t dim : dims_by_stride(tensor)) {
    if (tensor.size(dim) > 1) {
      coordinates[dim] = offset / tensor.stride(dim);
      offset %= tensor.stride(dim);
    }
  }
  int64_t index = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    index = index * tensor.size(dim) + coordinates[dim];
  }
  return index;
}

template <class Bits>
Nonfinite find_nonfinite(const Dense& tensor, const Chunk& chunk, Bits exponent) {
  const Bits* x = reinterpret_cast<const Bits*>(tensor.data) + chunk.begin;
  Nonfinite found;
  for (int64_t i = 0; i < chunk.size; ++i) {
    if ((x[i] & exponent) != exponent) {
      continue;
    }
    ++found.count;
    if (!tensor.contiguous) {
      const int64_t index = row_major_index(tensor.owner, chunk.begin + i);
      found.first = found.first == nowhere ? index : std::min(found.first, index);
    } else if (found.first == nowhere) {
      found.first = chunk.begin + i;
    }
  }
  return found;
}

Nonfinite find_nonfinite(const Dense& tensor, const Chunk& chunk) {
  switch (tensor.dtype) {
    case ScalarType::Double:
      return find_nonfinite<uint64_t>(tensor, chunk, 0x7ff0000000000000);
    case ScalarType::Float:
      return find_nonfinite<uint32_t>(tensor, chunk, 0x7f800000);
    case ScalarType::BFloat16:
      return find_nonfinite<uint16_t>(tensor, chunk, 0x7f80);
    default:
      return find_nonfinite<uint16_t>(tensor, chunk, 0x7c00);
  }
}

const GradNormKernels& kernels() {
  switch (cpu_capability()) {
#ifdef FASTGUARD_HAS_AVX512
    case Capability::avx512:
      return grad_norm_kernels_avx512;
#endif
#ifdef FASTGUARD_HAS_AVX2
    case Capability::avx2:
      return grad_norm_kernels_avx2;
#endif
    default:
      return grad_norm_kernels_default;
  }
}

double sum_squares(const GradNormKernels& kernel, const Dense& tensor, const Chunk& chunk) {
  const char* x = tensor.data + chunk.begin * element_size(tensor.dtype);
  switch (tensor.dtype) {
    case ScalarType::Double:
      return kernel.float64(x, chunk.size);
    case ScalarType::Float:
      return kernel.float32(x, chunk.size);
    case ScalarType::BFloat16:
      return kernel.bfloat16(x, chunk.size);
    default:
      return kernel.float16(x, chunk.size);
  }
}

// Calls work(chunk index) for all chunks. Threads take the next chunks as they get free: a thread
// that the machine slows down does not hold up the others.
template <class Work>
void for_each_chunk(const std::vector<Chunk>& chunks, const Work& work) {
  const int64_t n = static_cast<int64_t>(chunks.size());
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) {
    elements += chunk.size;
  }
  if (elements <= serial_elements) {
    for (int64_t c = 0; c < n; ++c) {
      work(c);
    }
    return;
  }
  constexpr int64_t batch = 8;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t c = next.fetch_add(batch); c < n; c = next.fetch_add(batch)) {
      for (int64_t i = c; i < std::min(c + batch, n); ++i) {
        work(i);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> grad_norm_cpu(const std::vector<Tensor>& grads) {
  std::vector<Dense> tensors;
  tensors.reserve(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    tensors.push_back(densify(grads[t], t));
  }
  const std::vector<Chunk> chunks = cut(tensors);

  std::vector<double> sums(chunks.size());
  std::vector<Nonfinite> bad(chunks.size());
  const GradNormKernels& kernel = kernels();
  for_each_chunk(chunks, [&](int64_t c) {
    const Dense& tensor = tensors[chunks[c].tensor];
    sums[c] = sum_squares(kernel, tensor, chunks[c]);
    if (!std::isfinite(sums[c])) {
      bad[c] = find_nonfinite(tensor, chunks[c]);
    }
  });

  const int64_t n = static_cast<int64_t>(grads.size());
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
    const int64_t t = chunks[c].tensor;
    norm[t] += sums[c];
    count[t] += bad[c].count;
    if (bad[c].count == 0 || (place[0] != nowhere && place[0] != t)) {
      continue;
    }
    place[1] = place[0] == nowhere ? bad[c].first : std::min(place[1], bad[c].first);
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

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("grad_norm", TORCH_BOX(&fastguard::grad_norm_cpu));
}
