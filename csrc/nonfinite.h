// The NaNs and Infs of a tensor or of a part of it; for CPU and CUDA.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace fastguard {

struct Nonfinite {
  int64_t nans = 0;
  int64_t infs = 0;
  int64_t first = -1;  // flat row-major index of the first NaN or Inf, -1 if there is none
};

FASTGUARD_HOST_DEVICE inline Nonfinite together(const Nonfinite& a, const Nonfinite& b) {
  const bool a_first =
      static_cast<uint64_t>(a.first) < static_cast<uint64_t>(b.first);  // -1 is last
  return {a.nans + b.nans, a.infs + b.infs, a_first ? a.first : b.first};
}

}  // namespace fastguard
