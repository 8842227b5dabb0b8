// Tensors as one range of memory, in any order of their elements; for every device.
#pragma once

#include "memory.h"
#include "permutation.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace fastguard {

// A tensor whose elements fill one range of memory without gaps, in any order.
struct Dense {
  torch::stable::Tensor tensor;
  // From the largest stride down; empty if the order is row-major.
  std::vector<PermutedDim> permutation;
  bool copied;  // whether `tensor` is a copy, because the given one has gaps
};

inline std::vector<int64_t> dims_by_stride(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> dims(tensor.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::stable_sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) {
    return tensor.stride(a) > tensor.stride(b);
  });
  return dims;
}

// The dimensions of a tensor without gaps in another order than row-major, such as a transposed or
// channels-last one; empty for a tensor with gaps or overlaps.
inline std::vector<PermutedDim> permutation_of(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> row_major(tensor.dim(), 1);
  for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
    row_major[dim] = row_major[dim + 1] * tensor.size(dim + 1);
  }
  const std::vector<int64_t> dims = dims_by_stride(tensor);
  std::vector<PermutedDim> permutation;
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

inline Dense densify(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return {tensor, {}, false};
  }
  std::vector<PermutedDim> permutation = permutation_of(tensor);
  if (!permutation.empty()) {
    return {tensor, std::move(permutation), false};
  }
  return {torch::stable::contiguous(tensor), {}, true};
}

// Tensors, each as one range of memory; a tensor with gaps is replaced by a copy. `written`:
// whether copy_back will be called. The constructor raises the errors of copy_back, before anything
// is written.
class DenseList {
 public:
  DenseList(const std::vector<torch::stable::Tensor>& tensors, bool written) : given_(tensors) {
    dense_.reserve(tensors.size());
    for (const torch::stable::Tensor& tensor : tensors) {
      dense_.push_back(densify(tensor));
      if (written && dense_.back().copied) {
        check_copies_into(tensor);
      }
    }
  }

  const Dense& operator[](size_t index) const { return dense_[index]; }

  // Writes the copies back into the given tensors.
  void copy_back() {
    for (size_t i = 0; i < given_.size(); ++i) {
      if (dense_[i].copied) {
        torch::stable::copy_(given_[i], dense_[i].tensor);
      }
    }
  }

 private:
  std::vector<torch::stable::Tensor> given_;
  std::vector<Dense> dense_;
};

// A tensor with the elements of `grad` and the memory layout of `like`, which has no gaps.
inline torch::stable::Tensor laid_out_as(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& like) {
  if (grad.strides().equals(like.strides())) {
    return grad;
  }
  torch::stable::Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, grad);
  return copy;
}

}  // namespace fastguard
