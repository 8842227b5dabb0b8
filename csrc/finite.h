// A test by bits whether a number is not finite while its saved copy is; for CPU and CUDA.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace fastguard {

// The bits of the exponent. Only an Inf or a NaN has all of them set.
constexpr uint16_t exponent_of_bfloat16 = 0x7f80;
constexpr uint16_t exponent_of_float16 = 0x7c00;
constexpr uint32_t exponent_of_float32 = 0x7f800000;
constexpr uint64_t exponent_of_float64 = 0x7ff0000000000000;

template <class Word>
FASTGUARD_HOST_DEVICE inline bool lost(Word now, Word saved, Word exponent) {
  return (now & exponent) == exponent && (saved & exponent) != exponent;
}

}  // namespace fastguard
