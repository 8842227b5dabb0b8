// Conversion of elements of each dtype from and to double, rounded to nearest even.
//
// Everything is in an unnamed namespace: the files that include this are compiled for different
// instruction sets, and the linker would keep one copy of an inline function with linkage for all.
#pragma once

#include "intrinsics.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastguard {
namespace {

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

struct Float32 {
  using storage = float;
  static double widen(storage x) { return x; }
  static storage narrow(double x) { return static_cast<float>(x); }
};

struct Float64 {
  using storage = double;
  static double widen(storage x) { return x; }
  static storage narrow(double x) { return x; }
};

struct BFloat16 {
  using storage = uint16_t;
  static double widen(storage x) { return float_of(uint32_t{x} << 16); }
  static storage narrow(double x) {
    const uint32_t bits = bits_of(static_cast<float>(x));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    // An addition to the bits of a NaN could turn it into an Inf.
    return static_cast<storage>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct Float16 {
  using storage = uint16_t;

  // Moves exponent and mantissa into place and corrects the exponent's bias by a multiplication,
  // which also normalises subnormals.
  static double widen(storage x) {
    const uint32_t magnitude = uint32_t{x} & 0x7fff;
    const uint32_t nonfinite = magnitude >= 0x7c00 ? 0x7f800000 : 0;
    const float value = float_of((magnitude << 13) | nonfinite) * 0x1p112f;
    return x & 0x8000 ? -value : value;
  }

  static storage narrow(double x) {
    uint32_t bits = bits_of(static_cast<float>(x));
    const uint32_t sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) {
      return static_cast<storage>(sign | 0x7e00);
    }
    if (bits >= bits_of(65520.0f)) {  // halfway between the largest half and the next would-be
      return static_cast<storage>(sign | 0x7c00);
    }
    if (bits < bits_of(0x1p-14f)) {
      // The last bit of 0.5f has the value 2^-24, as the last bit of a subnormal half has. The
      // addition therefore rounds.
      return static_cast<storage>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return static_cast<storage>(sign | ((bits - 0x38000000) >> 13));
  }
};

#ifdef __F16C__
// The vectorizer does not find this conversion by itself; without it fp16 took 3x the time.
inline void widen8(const uint16_t* x, float (&values)[8]) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  _mm256_storeu_ps(values, _mm256_cvtph_ps(halves));
}
#endif

}  // namespace
}  // namespace fastguard
