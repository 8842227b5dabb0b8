// The layout of the optimizer's state: one tensor holds the moments of all parameters of a call.
// Twin: packed_offsets in fastguard/ops/packed.py.
#pragma once

#include "adamw_options.h"
#include "tensor_list.h"

#include <cstdint>
#include <vector>

namespace fastguard {

// The start of the moments of each parameter, and at the end the size of the pack.
inline std::vector<int64_t> packed_offsets(const TensorList& params) {
  std::vector<int64_t> offsets;
  offsets.reserve(params.size() + 1);
  int64_t next = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    offsets.push_back(next);
    next += (params[i].numel() + packed_alignment - 1) / packed_alignment * packed_alignment;
  }
  offsets.push_back(next);
  return offsets;
}

}  // namespace fastguard
