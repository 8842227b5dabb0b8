#pragma once

#include <cstdint>

namespace fastguard {

constexpr int64_t strip_channels = 32;  // of one task

}  // namespace fastguard
