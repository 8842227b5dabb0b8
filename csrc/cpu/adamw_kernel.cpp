// This source is compiled once per instruction set, which FASTGUARD_CAPABILITY names. Without
// contraction and with IEEE's sqrt and division, the results of all instruction sets are bitwise
// equal.

#include "adamw_kernel.h"

#include "concat.h"
#include "elements.h"

#include <cmath>

namespace fastguard {
namespace {

constexpr int64_t tile = 256;  // elements whose scaled gradients lie on the stack: 1 KiB of float

constexpr int64_t prefetch_tiles = 2;  // the hardware's own prefetch stops at 4 KiB boundaries

template <class Element>
inline void prefetch(const Element* x) {
#if defined(__GNUC__)
  const char* next = reinterpret_cast<const char*>(x) + prefetch_tiles * tile * sizeof(Element);
  for (int64_t byte = 0; byte < tile * static_cast<int64_t>(sizeof(Element)); byte += 64) {
    __builtin_prefetch(next + byte);
  }
#else
  (void)x;
#endif
}

template <class Type>
using Math = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;

// Each of n elements times a factor. The product is computed in double, which holds elements of
// 1e38 and factors of 1e-43.
template <class Type>
inline void read(
    const typename Type::storage* __restrict x,
    Math<Type>* __restrict values,
    int64_t n,
    double factor) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<Type, Float16>) {
    for (; i + 8 <= n; i += 8) {
      float wide[8];
      widen8(x + i, wide);
      for (int lane = 0; lane < 8; ++lane) {
        values[i + lane] = static_cast<float>(wide[lane] * factor);
      }
    }
  }
#endif
  for (; i < n; ++i) {
    values[i] = static_cast<Math<Type>>(Type::widen(x[i]) * factor);
  }
}

template <class Type>
inline void write(
    const Math<Type>* __restrict values, typename Type::storage* __restrict x, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<Type, Float16>) {
    for (; i + 8 <= n; i += 8) {
      float wide[8];
      std::memcpy(wide, values + i, sizeof(wide));
      narrow8(wide, x + i);
    }
  }
#endif
  for (; i < n; ++i) {
    x[i] = Type::narrow(values[i]);
  }
}

template <bool amsgrad, bool coupled, class Real>
inline void update(
    Real* __restrict param,
    const Real* __restrict grad,
    Real* __restrict exp_avg,
    Real* __restrict exp_avg_sq,
    Real* __restrict max_exp_avg_sq,
    int64_t n,
    const AdamwRule<Real>& given) {
  const AdamwRule<Real> rule = given;  // a copy stays in registers: no write can change it
  for (int64_t i = 0; i < n; ++i) {
    Real m = exp_avg[i], v = exp_avg_sq[i];
    Real largest = amsgrad ? max_exp_avg_sq[i] : Real{0};
    param[i] = adamw_update<amsgrad>(rule, coupled, param[i], grad[i], m, v, largest);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (amsgrad) {
      max_exp_avg_sq[i] = largest;
    }
  }
}

template <class Param, class Grad>
void adamw(
    void* param,
    const void* grad,
    void* exp_avg,
    void* exp_avg_sq,
    void* max_exp_avg_sq,
    int64_t n,
    double grad_coef,
    const BiasCorrection& bias,
    const AdamwOptions& options) {
  using Real = Math<Param>;
  const AdamwRule<Real> rule = adamw_rule_of<Real>(options, bias, grad_coef);
  constexpr bool in_place = std::is_same_v<typename Param::storage, Real>;
  auto* p = static_cast<typename Param::storage*>(param);
  auto* g = static_cast<const typename Grad::storage*>(grad);
  auto* m = static_cast<Real*>(exp_avg);
  auto* v = static_cast<Real*>(exp_avg_sq);
  auto* largest = static_cast<Real*>(max_exp_avg_sq);
  const auto loop = largest != nullptr
      ? (rule.coupled ? update<true, true, Real> : update<true, false, Real>)
      : (rule.coupled ? update<false, true, Real> : update<false, false, Real>);
  Real scaled[tile];
  [[maybe_unused]] Real wide[in_place ? 1 : tile];
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t size = n - i < tile ? n - i : tile;
    Real* max_tile = largest != nullptr ? largest + i : nullptr;
    prefetch(p + i);
    prefetch(g + i);
    prefetch(m + i);
    prefetch(v + i);
    read<Grad>(g + i, scaled, size, rule.grad_coef);
    if constexpr (in_place) {
      loop(p + i, scaled, m + i, v + i, max_tile, size, rule);
    } else {
      read<Param>(p + i, wide, size, 1.0);
      loop(wide, scaled, m + i, v + i, max_tile, size, rule);
      write<Param>(wide, p + i, size);
    }
  }
}

}  // namespace

extern const AdamwKernels FASTGUARD_CONCAT(adamw_kernels_, FASTGUARD_CAPABILITY) = {
    {adamw<Float32, Float32>,
     adamw<Float64, Float64>,
     adamw<BFloat16, BFloat16>,
     adamw<Float16, Float16>},
    {adamw<Float32, Float32>, nullptr, adamw<BFloat16, Float32>, adamw<Float16, Float32>}};

}  // namespace fastguard
