// Vectors of float and double for the widest instruction set that the file is compiled for. Float
// has implementations for AVX-512, AVX2 and NEON (vector_neon.h), which define
// FASTGUARD_FLOAT_VECTORS; other cases, and double, use arrays.
//
// In an unnamed namespace for the same reason as elements.h.
#pragma once

#include "elements.h"

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define FASTGUARD_FLOAT_VECTORS
#define FASTGUARD_NEON
#include "vector_neon.h"
#endif

namespace fastguard {
namespace {

// One bit for each lane, the lowest for the first.
using Bits = uint32_t;

// exp(x) for |x| <= log(2) / 2: the polynomial of degree 5 with p(0) = 1 and the smallest largest
// relative error, 9.1e-8.
constexpr float exp_polynomial[] = {
    1.0f, 0.9999997072f, 0.4999914951f, 0.1666763621f, 0.0418979299f, 0.0082903136f};

// (tanh(x) - x) / x^3 as a polynomial in x^2, |x| < 0.625: that of Cephes' tanhf (Moshier).
constexpr float tanh_polynomial[] = {
    -3.33332819422e-1f,
    1.33314422036e-1f,
    -5.37397155531e-2f,
    2.06390887954e-2f,
    -5.70498872745e-3f};

// max(a, b): b if either is NaN, on every instruction set.

template <class T>
struct Vec {
  static constexpr int lanes = 8;
  T at[lanes];

  static Vec load(const T* x) {
    Vec v;
    for (int i = 0; i < lanes; ++i)
      v.at[i] = x[i];
    return v;
  }
  static Vec all(T x) {
    Vec v;
    for (int i = 0; i < lanes; ++i)
      v.at[i] = x;
    return v;
  }
  void store(T* x) const {
    for (int i = 0; i < lanes; ++i)
      x[i] = at[i];
  }
  template <class F>
  static Vec map(const F& f) {
    Vec v;
    for (int i = 0; i < lanes; ++i)
      v.at[i] = f(i);
    return v;
  }
  friend Vec operator+(Vec a, Vec b) {
    return map([&](int i) { return a.at[i] + b.at[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return map([&](int i) { return a.at[i] - b.at[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return map([&](int i) { return a.at[i] * b.at[i]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return map([&](int i) { return a.at[i] / b.at[i]; });
  }
};

template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>::map([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
template <class T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
template <class T>
inline Vec<T> abs(Vec<T> a) {
  return Vec<T>::map([&](int i) { return std::fabs(a.at[i]); });
}
// a if the bit is set, else b.
template <class T>
inline Vec<T> select(Bits bits, Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return bits >> i & 1 ? a.at[i] : b.at[i]; });
}
// Each element times a factor. The product is computed in double, which holds elements of 1e38 and
// factors of 1e-43.
template <class T>
inline Vec<T> product(Vec<T> a, double factor) {
  return Vec<T>::map([&](int i) { return static_cast<T>(a.at[i] * factor); });
}
template <class T>
inline Bits less(Vec<T> a, Vec<T> b) {
  Bits bits = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i)
    bits |= Bits{a.at[i] < b.at[i]} << i;
  return bits;
}
template <class T>
inline T reduce_add(Vec<T> a) {
  T sum = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i)
    sum += a.at[i];
  return sum;
}
template <class T>
inline T reduce_max(Vec<T> a) {
  T most = a.at[0];
  for (int i = 1; i < Vec<T>::lanes; ++i)
    most = most > a.at[i] ? most : a.at[i];
  return most;
}
template <class T>
inline Vec<T> exp(Vec<T> a) {
  return Vec<T>::map([&](int i) { return std::exp(a.at[i]); });
}
template <class T>
inline Vec<T> tanh(Vec<T> a) {
  return Vec<T>::map([&](int i) { return std::tanh(a.at[i]); });
}

#ifdef __AVX512F__

#define FASTGUARD_FLOAT_VECTORS

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;

  static Vec load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
};

using Floats = Vec<float>;

inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats select(Bits bits, Floats a, Floats b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
inline Bits less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
// One bit for each lane whose 16 bits are equal.
inline Bits equal16(const uint16_t* a, const uint16_t* b) {
  return _mm256_cmpeq_epi16_mask(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}
inline Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
// max(a, b); NaN if one of them is.
inline Floats larger(Floats a, Floats b) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), nan, a.v)};
}
inline Floats product(Floats a, double factor) {
  const __m512d factors = _mm512_set1_pd(factor);
  const __m512d low = _mm512_mul_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), factors);
  const __m512d high = _mm512_mul_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)), factors);
  const __m512 lower = _mm512_castps256_ps512(_mm512_cvtpd_ps(low));
  return {_mm512_insertf32x8(lower, _mm512_cvtpd_ps(high), 1)};
}
inline float reduce_add(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Floats round_nearest(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a 2^n for integer n.
inline Floats times_exp2(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Floats with_sign_of(Floats a, Floats sign) {
  return {_mm512_or_ps(a.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}

#elif defined(__AVX2__)

#define FASTGUARD_FLOAT_VECTORS

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  static Vec load(const float* x) { return {_mm256_loadu_ps(x)}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* x) const { _mm256_storeu_ps(x, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
};

using Floats = Vec<float>;

inline Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Floats select(Bits bits, Floats a, Floats b) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)))};
}
inline Bits less(Floats a, Floats b) {
  return static_cast<Bits>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)));
}
inline Bits equal16(const uint16_t* a, const uint16_t* b) {
  const __m128i equal = _mm_cmpeq_epi16(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  return static_cast<Bits>(_mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128())));
}
inline Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.v)}; }
inline Floats larger(Floats a, Floats b) {
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, nan)};
}
inline Floats product(Floats a, double factor) {
  const __m256d factors = _mm256_set1_pd(factor);
  const __m256d low = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), factors);
  const __m256d high = _mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)), factors);
  return {_mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low))};
}
inline float reduce_add(Floats a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Floats a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline Floats round_nearest(Floats a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Floats times_exp2(Floats a, Floats n) {
  // Two steps, because the exponent of 2^-159 is out of range.
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  const __m256i e = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(e, 1);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(e, half)))};
}
inline Floats with_sign_of(Floats a, Floats sign) {
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}

#elif !defined(FASTGUARD_FLOAT_VECTORS)

using Floats = Vec<float>;

#endif

#ifdef FASTGUARD_FLOAT_VECTORS

// exp(x): 0 from -inf to -104, inf from 89 on, NaN for NaN. x = n log(2) + r. log(2) is split into
// two parts; the product of n and the first part is exact (Cody and Waite).
inline Floats exp(Floats x) {
  x = min(Floats::all(110.0f), max(Floats::all(-110.0f), x));
  const Floats n = round_nearest(x * Floats::all(1.44269504f));
  const Floats r = fma(n, Floats::all(2.12194440e-4f), fma(n, Floats::all(-0.693359375f), x));
  Floats sum = Floats::all(exp_polynomial[5]);
  for (int i = 4; i >= 0; --i) {
    sum = fma(sum, r, Floats::all(exp_polynomial[i]));
  }
  return times_exp2(sum, n);
}

inline Floats tanh(Floats x) {
  const Floats square = x * x, one = Floats::all(1.0f), size = abs(x);
  Floats sum = Floats::all(tanh_polynomial[4]);
  for (int i = 3; i >= 0; --i) {
    sum = fma(sum, square, Floats::all(tanh_polynomial[i]));
  }
  const Floats small = fma(sum * square, x, x);
  const Floats power = exp(size + size);
  const Floats large = with_sign_of(one - Floats::all(2.0f) / (power + one), x);
  return select(less(size, Floats::all(0.625f)), small, large);
}

#endif

// --- elements as vectors
// ----------------------------------------------------------------------------

// A vector of consecutive elements in the type they are computed in.
template <class T, class Type>
inline Vec<T> load_as(const typename Type::storage* x) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Type, Float16>) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
  } else if constexpr (std::is_same_v<Type, BFloat16>) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Type, Float16>) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
  } else if constexpr (std::is_same_v<Type, BFloat16>) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
#elif defined(FASTGUARD_NEON)
  if constexpr (std::is_same_v<Type, Float16>) {
    return load_float16(x);
  } else if constexpr (std::is_same_v<Type, BFloat16>) {
    return load_bfloat16(x);
  }
#endif
  if constexpr (std::is_same_v<T, typename Type::storage>) {
    return Vec<T>::load(x);
  } else {
    T wide[Vec<T>::lanes];
    for (int i = 0; i < Vec<T>::lanes; ++i) {
      wide[i] = static_cast<T>(Type::widen(x[i]));
    }
    return Vec<T>::load(wide);
  }
}

template <class Type, class T>
inline void store_as(Vec<T> v, typename Type::storage* x) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<Type, Float16>) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(x),
        _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  } else if constexpr (std::is_same_v<Type, BFloat16>) {  // as BFloat16::narrow
    const __m512i bits = _mm512_castps_si512(v.v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm512_cvtepi32_epi16(words));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<Type, Float16>) {
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(x),
        _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  } else if constexpr (std::is_same_v<Type, BFloat16>) {  // as BFloat16::narrow
    const __m256i bits = _mm256_castps_si256(v.v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm_packus_epi32(low, high));
    return;
  }
#elif defined(FASTGUARD_NEON)
  if constexpr (std::is_same_v<Type, Float16>) {
    store_float16(v, x);
    return;
  } else if constexpr (std::is_same_v<Type, BFloat16>) {
    store_bfloat16(v, x);
    return;
  }
#endif
  if constexpr (std::is_same_v<T, typename Type::storage>) {
    v.store(x);
  } else {
    T wide[Vec<T>::lanes];
    v.store(wide);
    for (int i = 0; i < Vec<T>::lanes; ++i) {
      x[i] = Type::narrow(wide[i]);
    }
  }
}

}  // namespace
}  // namespace fastguard
