// Vec<float> for ARM's NEON: eight floats in two registers. Included by vector.h.
#pragma once

#include "elements.h"

#include <arm_neon.h>

namespace fastguard {
namespace {

template <class T>
struct Vec;
using Bits = uint32_t;

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  float32x4_t low, high;

  static Vec load(const float* x) { return {vld1q_f32(x), vld1q_f32(x + 4)}; }
  static Vec all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  void store(float* x) const {
    vst1q_f32(x, low);
    vst1q_f32(x + 4, high);
  }
  friend Vec operator+(Vec a, Vec b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
  }
  friend Vec operator-(Vec a, Vec b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  friend Vec operator*(Vec a, Vec b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
  }
  friend Vec operator/(Vec a, Vec b) {
    return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
  }
};

using Floats = Vec<float>;

// Masks of the lanes: all bits of a lane, or none.
struct Lanes {
  uint32x4_t low, high;
};

inline Floats blend(Lanes mask, Floats a, Floats b) {
  return {vbslq_f32(mask.low, a.low, b.low), vbslq_f32(mask.high, a.high, b.high)};
}
inline Lanes greater(Floats a, Floats b) {
  return {vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)};
}
inline Lanes is_number(Floats a) { return {vceqq_f32(a.low, a.low), vceqq_f32(a.high, a.high)}; }

inline Floats fma(Floats a, Floats b, Floats c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline Floats max(Floats a, Floats b) { return blend(greater(a, b), a, b); }
inline Floats min(Floats a, Floats b) { return blend(greater(b, a), a, b); }
inline Floats abs(Floats a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }

constexpr uint32_t lane_bits[] = {1, 2, 4, 8, 16, 32, 64, 128};

inline Floats select(Bits bits, Floats a, Floats b) {
  const uint32x4_t every = vdupq_n_u32(bits);
  return blend(
      {vtstq_u32(every, vld1q_u32(lane_bits)), vtstq_u32(every, vld1q_u32(lane_bits + 4))}, a, b);
}
inline Bits less(Floats a, Floats b) {
  const Lanes mask = greater(b, a);
  return vaddvq_u32(vandq_u32(mask.low, vld1q_u32(lane_bits))) +
      vaddvq_u32(vandq_u32(mask.high, vld1q_u32(lane_bits + 4)));
}
inline Bits equal16(const uint16_t* a, const uint16_t* b) {
  constexpr uint16_t bits[] = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u16(vandq_u16(vceqq_u16(vld1q_u16(a), vld1q_u16(b)), vld1q_u16(bits)));
}
inline Floats sqrt(Floats a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
inline Floats larger(Floats a, Floats b) { return blend(is_number(a), max(a, b), a); }

inline float32x4_t product(float32x4_t a, float64x2_t factors) {
  const float64x2_t low = vmulq_f64(vcvt_f64_f32(vget_low_f32(a)), factors);
  return vcvt_high_f32_f64(vcvt_f32_f64(low), vmulq_f64(vcvt_high_f64_f32(a), factors));
}
inline Floats product(Floats a, double factor) {
  const float64x2_t factors = vdupq_n_f64(factor);
  return {product(a.low, factors), product(a.high, factors)};
}
inline float reduce_add(Floats a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
inline float reduce_max(Floats a) {
  float at[8];
  a.store(at);
  float most = at[0];
  for (const float x : at) {
    most = most > x ? most : x;
  }
  return most;
}

inline Floats round_nearest(Floats a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
// a 2^n for integer n, in two steps, because the exponent of 2^-159 is out of range.
inline float32x4_t times_exp2(float32x4_t a, float32x4_t n) {
  const auto power = [](int32x4_t e) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
  };
  const int32x4_t e = vcvtq_s32_f32(n), half = vshrq_n_s32(e, 1);
  return vmulq_f32(vmulq_f32(a, power(half)), power(vsubq_s32(e, half)));
}
inline Floats times_exp2(Floats a, Floats n) {
  return {times_exp2(a.low, n.low), times_exp2(a.high, n.high)};
}
inline float32x4_t with_sign_of(float32x4_t a, float32x4_t sign) {
  const uint32x4_t bit = vandq_u32(vreinterpretq_u32_f32(sign), vdupq_n_u32(0x80000000u));
  return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), bit));
}
inline Floats with_sign_of(Floats a, Floats sign) {
  return {with_sign_of(a.low, sign.low), with_sign_of(a.high, sign.high)};
}

// --- 16-bit elements
// --------------------------------------------------------------------------------

inline Floats load_float16(const uint16_t* x) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(x));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
inline void widen8(const uint16_t* x, float (&values)[8]) { load_float16(x).store(values); }
inline Floats load_bfloat16(const uint16_t* x) {
  const uint16x8_t words = vld1q_u16(x);
  return {
      vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(words), 16)),
      vreinterpretq_f32_u32(vshll_high_n_u16(words, 16))};
}
inline void store_float16(Floats v, uint16_t* x) {
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high);
  vst1q_u16(x, vreinterpretq_u16_f16(halves));
}
// As BFloat16::narrow.
inline uint16x4_t narrow_bfloat16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32(v, v);
  return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc0u << 16)), 16);
}
inline void store_bfloat16(Floats v, uint16_t* x) {
  vst1_u16(x, narrow_bfloat16(v.low));
  vst1_u16(x + 4, narrow_bfloat16(v.high));
}

}  // namespace
}  // namespace fastguard
