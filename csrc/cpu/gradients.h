// The common part of the ops over a list of gradients: the list as slices of fixed size, a parallel
// region over them, and the choice of the kernel for a dtype.
#pragma once

#include "dense.h"
#include "gradients_kernel.h"
#include "tasks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fastguard {

using torch::headeronly::ScalarType;

constexpr int64_t slice_elements = 16384;  // 64 KiB of fp32: a slice read twice is read from L2
constexpr int64_t serial_elements = 32768;  // below this a parallel region costs more than it saves

// A tensor without gaps, as one range of memory.
struct Span {
  char* data;
  int64_t numel;
  ScalarType dtype;
};

struct Slice {
  size_t span;
  int64_t begin;  // in elements
  int64_t size;
};

inline Span span_of(const torch::stable::Tensor& tensor) {
  char* data = const_cast<char*>(static_cast<const char*>(tensor.const_data_ptr()));
  return {data, tensor.numel(), tensor.scalar_type()};
}

// Tensors that a kernel writes.
class Written : public DenseList {
 public:
  explicit Written(const std::vector<torch::stable::Tensor>& tensors) : DenseList(tensors, true) {
    spans.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const torch::stable::Tensor& tensor = (*this)[i].tensor;
      tensor.mutable_data_ptr();  // makes a copy-on-write tensor its own
      spans.push_back(span_of(tensor));
    }
  }

  std::vector<Span> spans;
};

template <class Function>
Function* pick(const PerDtype<Function>& kernels, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return kernels.float64;
    case ScalarType::Float:
      return kernels.float32;
    case ScalarType::BFloat16:
      return kernels.bfloat16;
    default:
      return kernels.float16;
  }
}

inline char* data_of(const Span& span, const Slice& slice) {
  const int64_t bytes = span.dtype == ScalarType::Double ? 8
      : span.dtype == ScalarType::Float                  ? 4
                                                         : 2;
  return span.data + slice.begin * bytes;
}

inline std::vector<Slice> cut(const std::vector<Span>& spans) {
  std::vector<Slice> slices;
  for (size_t s = 0; s < spans.size(); ++s) {
    for (int64_t begin = 0; begin < spans[s].numel; begin += slice_elements) {
      slices.push_back({s, begin, std::min(slice_elements, spans[s].numel - begin)});
    }
  }
  return slices;
}

// Calls work(index of a slice) for all slices. `work` must not throw.
template <class Work>
void for_each_slice(const std::vector<Slice>& slices, const Work& work) {
  const int64_t n = static_cast<int64_t>(slices.size());
  const int64_t threads = torch::stable::get_num_threads();
  int64_t elements = 0;
  for (const Slice& slice : slices) {
    elements += slice.size;
  }
  const int64_t batch = std::clamp<int64_t>(n / (4 * threads), 1, 8);
  for_each_task(n, batch, elements > serial_elements, [&](int64_t) -> const Work& { return work; });
}

}  // namespace fastguard
