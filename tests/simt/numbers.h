// The conversions of a GPU, bit for bit: to nearest, ties to even, subnormals kept.
#pragma once

#include <bit>
#include <cstdint>

namespace fastguard {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 31;
  const uint32_t mantissa = x.bits & 1023u;
  if (exponent == 31) {
    return std::bit_cast<float>(mantissa != 0 ? 0x7fffffffu : sign | 0x7f800000u);
  }
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

namespace detail {

constexpr uint16_t nan16 = 0x7fff;  // what cvt.rn gives for every NaN, in both formats

// Drops the low bits: to nearest, ties to even.
inline uint32_t round_off(uint32_t x, int bits) {
  return (x + (1u << (bits - 1)) - 1 + (x >> bits & 1)) >> bits;
}

inline uint16_t bfloat16_bits(float x) {
  return x != x ? nan16 : static_cast<uint16_t>(round_off(std::bit_cast<uint32_t>(x), 16));
}

inline uint16_t float16_bits(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000;
  const uint32_t magnitude = std::bit_cast<uint32_t>(x) & 0x7fffffff;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    return nan16;
  }
  if (magnitude >= 0x477ff000) {  // 65520: half way from the largest finite one to the next
    bits = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: in 0.5 the last place is worth 2^-24 too
    bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    bits = round_off(magnitude - (112u << 23), 13);
  }
  return static_cast<uint16_t>(sign | bits);
}

}  // namespace detail

template <class T>
inline T from_float(float x) {
  if constexpr (__is_same(T, float)) {
    return x;
  } else if constexpr (__is_same(T, BFloat16)) {
    return {detail::bfloat16_bits(x)};
  } else {
    return {detail::float16_bits(x)};
  }
}

}  // namespace fastguard
