// Whether a number that was finite no longer is, told by its bits; for CPU and CUDA.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace fastguard {

// The bits of the exponent, all of which are set in an Inf and in a NaN, and in no other number.
constexpr uint16_t exponent_of_bfloat16 = 0x7f80;
constexpr uint16_t exponent_of_float16 = 0x7c00;
constexpr uint32_t exponent_of_float32 = 0x7f800000;
constexpr uint64_t exponent_of_float64 = 0x7ff0000000000000;

template <class Word>
FASTGUARD_HOST_DEVICE inline bool lost(Word now, Word saved, Word exponent) {
  return (now & exponent) == exponent && (saved & exponent) != exponent;
}

}  // namespace fastguard
