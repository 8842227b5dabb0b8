// This source is compiled once per instruction set, which FASTGUARD_CAPABILITY names. Without
// contraction and with IEEE's sqrt and division, the results of all instruction sets are bitwise
// equal.

#include "adamw_kernel.h"

#include "concat.h"
#include "vector.h"

#include <cmath>

namespace fastguard {
namespace {

// How a loop computes: on one element at a time, or on a vector of consecutive elements. `scaled`
// is the elements times a factor. The product is computed in double, which holds elements of 1e38
// and factors of 1e-43. `current` is the value of parameters with masters: the master where the
// parameter is its rounded value, bit for bit, else the parameter, which something else has
// written.

// The compiler's vectorizer makes vectors of it where there are no conversions to and from fp16.
template <class Real>
struct One {
  using Value = Real;
  static constexpr int64_t size = 1;

  static Value all(Real x) { return x; }
  template <class Type>
  static Value load(const typename Type::storage* x) {
    return static_cast<Real>(Type::widen(*x));
  }
  template <class Type>
  static Value scaled(const typename Type::storage* x, double factor) {
    return static_cast<Real>(Type::widen(*x) * factor);
  }
  template <class Type>
  static Value current(const typename Type::storage* x, Value master) {
    return Type::narrow(master) == *x ? master : load<Type>(x);
  }
  template <class Type>
  static void store(Value value, typename Type::storage* x) {
    *x = Type::narrow(value);
  }
  static void prefetch(const void*, int64_t) {}
};

#ifdef FASTGUARD_FLOAT_VECTORS
struct Several {
  using Value = Floats;
  static constexpr int64_t size = Floats::lanes;

  static Value all(float x) { return Floats::all(x); }
  template <class Type>
  static Value load(const typename Type::storage* x) {
    return load_as<float, Type>(x);
  }
  template <class Type>
  static Value scaled(const typename Type::storage* x, double factor) {
    return product(load_as<float, Type>(x), factor);
  }
  template <class Type>
  static Value current(const typename Type::storage* x, Value master) {
    typename Type::storage rounded[size];
    store_as<Type>(master, rounded);
    return select(equal16(rounded, x), master, load_as<float, Type>(x));
  }
  template <class Type>
  static void store(Value value, typename Type::storage* x) {
    store_as<Type>(value, x);
  }
  static void prefetch(const void* x, int64_t bytes) {
#if defined(__GNUC__)
    __builtin_prefetch(static_cast<const char*>(x) + bytes);
#else
    (void)x, (void)bytes;
#endif
  }
};
#endif

template <class Lanes, class Real>
AdamwRule<typename Lanes::Value> rule_for(const AdamwRule<Real>& rule) {
  return {
      rule.grad_coef,
      Lanes::all(rule.beta1),
      Lanes::all(rule.to1),
      Lanes::all(rule.beta2),
      Lanes::all(rule.to2),
      Lanes::all(rule.eps),
      Lanes::all(rule.weight_decay),
      Lanes::all(rule.step_size),
      Lanes::all(rule.root_factor),
      rule.coupled};
}

// Steps the elements from `begin` on, as many at a time as Lanes has; returns the first of the
// rest.
template <
    class Lanes,
    class Param,
    class Grad,
    bool amsgrad,
    bool coupled,
    bool masters,
    class Real>
int64_t update(
    const AdamwRange& range, int64_t begin, const AdamwRule<Real>& given, int64_t prefetch_bytes) {
  using Moment = std::conditional_t<std::is_same_v<Real, double>, Float64, Float32>;
  auto* __restrict param = static_cast<typename Param::storage*>(range.param);
  auto* __restrict grad = static_cast<const typename Grad::storage*>(range.grad);
  auto* __restrict exp_avg = static_cast<Real*>(range.exp_avg);
  auto* __restrict exp_avg_sq = static_cast<Real*>(range.exp_avg_sq);
  auto* __restrict max_exp_avg_sq = static_cast<Real*>(range.max_exp_avg_sq);
  float* __restrict master = range.master;
  const auto rule = rule_for<Lanes>(given);
  const int64_t n = range.n;
  int64_t i = begin;
  for (; i + Lanes::size <= n; i += Lanes::size) {
    Lanes::prefetch(param + i, prefetch_bytes);
    Lanes::prefetch(grad + i, prefetch_bytes);
    Lanes::prefetch(exp_avg + i, prefetch_bytes);
    Lanes::prefetch(exp_avg_sq + i, prefetch_bytes);
    auto m = Lanes::template load<Moment>(exp_avg + i);
    auto v = Lanes::template load<Moment>(exp_avg_sq + i);
    auto largest = v;
    if constexpr (amsgrad) {
      largest = Lanes::template load<Moment>(max_exp_avg_sq + i);
    }
    typename Lanes::Value p;
    if constexpr (masters) {
      Lanes::prefetch(master + i, prefetch_bytes);
      p = Lanes::template current<Param>(param + i, Lanes::template load<Float32>(master + i));
    } else {
      p = Lanes::template load<Param>(param + i);
    }
    const auto g = Lanes::template scaled<Grad>(grad + i, rule.grad_coef);
    const auto next = adamw_update<amsgrad>(rule, coupled, p, g, m, v, largest);
    Lanes::template store<Param>(next, param + i);
    Lanes::template store<Moment>(m, exp_avg + i);
    Lanes::template store<Moment>(v, exp_avg_sq + i);
    if constexpr (amsgrad) {
      Lanes::template store<Moment>(largest, max_exp_avg_sq + i);
    }
    if constexpr (masters) {
      Lanes::template store<Float32>(next, master + i);
    }
  }
  return i;
}

template <class Param, class Grad, bool amsgrad, bool coupled, bool masters, class Real>
void update_all(const AdamwRange& range, const AdamwRule<Real>& rule, int64_t prefetch_bytes) {
  int64_t i = 0;
#ifdef FASTGUARD_FLOAT_VECTORS
  if constexpr (std::is_same_v<Real, float>) {
    i = update<Several, Param, Grad, amsgrad, coupled, masters>(range, i, rule, prefetch_bytes);
  }
#endif
  update<One<Real>, Param, Grad, amsgrad, coupled, masters>(range, i, rule, prefetch_bytes);
}

template <class Param, class Grad, bool masters, class Real>
void update_by(const AdamwRange& range, const AdamwRule<Real>& rule, int64_t prefetch_bytes) {
  const bool amsgrad = range.max_exp_avg_sq != nullptr;
  const auto loop = amsgrad ? (rule.coupled ? update_all<Param, Grad, true, true, masters, Real>
                                            : update_all<Param, Grad, true, false, masters, Real>)
                            : (rule.coupled ? update_all<Param, Grad, false, true, masters, Real>
                                            : update_all<Param, Grad, false, false, masters, Real>);
  loop(range, rule, prefetch_bytes);
}

template <class Param, class Grad>
void adamw(
    const AdamwRange& range,
    double grad_coef,
    const BiasCorrection& bias,
    const AdamwOptions& options,
    int64_t prefetch_bytes) {
  using Real = std::conditional_t<std::is_same_v<Param, Float64>, double, float>;
  const AdamwRule<Real> rule = adamw_rule_of<Real>(options, bias, grad_coef);
  if constexpr (sizeof(typename Param::storage) == 2) {
    if (range.master != nullptr) {
      update_by<Param, Grad, true>(range, rule, prefetch_bytes);
      return;
    }
  }
  update_by<Param, Grad, false>(range, rule, prefetch_bytes);
}

}  // namespace

extern const AdamwKernels FASTGUARD_CONCAT(adamw_kernels_, FASTGUARD_CAPABILITY) = {
    {adamw<Float32, Float32>,
     adamw<Float64, Float64>,
     adamw<BFloat16, BFloat16>,
     adamw<Float16, Float16>},
    {adamw<Float32, Float32>, nullptr, adamw<BFloat16, Float32>, adamw<Float16, Float32>}};

}  // namespace fastguard
