// The order of elements in the memory of a tensor without gaps; for CPU and CUDA.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace fastguard {

// A dimension of a tensor without gaps in another order than row-major.
struct alignas(16) PermutedDim {
  int64_t stride;
  int64_t row_major_stride;  // the tensor's stride in this dimension if it were contiguous
};

// The row-major index of the element at `offset`, in elements. The dimensions `begin` to `end` of
// `dims` are ordered from the largest stride down. `load` reads a number from an address.
template <class Load>
FASTGUARD_HOST_DEVICE inline int64_t row_major_index(
    const PermutedDim* dims, int begin, int end, int64_t offset, const Load& load) {
  if (begin == end) {
    return offset;
  }
  int64_t index = 0;
  for (int i = begin; i < end; ++i) {
    const int64_t stride = load(&dims[i].stride);
    index += offset / stride * load(&dims[i].row_major_stride);
    offset %= stride;
  }
  return index;
}

}  // namespace fastguard
