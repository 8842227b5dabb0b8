// Conversion of elements of each dtype. The CPU's twin is csrc/cpu/elements.h.
#pragma once

#include "cuda/plan.cuh"

#include <type_traits>

namespace fastguard {

// The same number, as a double or a float.
__device__ inline double widened(double x) { return x; }
template <class T>
__device__ inline float widened(T x) {
  return to_float(x);
}

// Rounds to nearest. A double is rounded to float before it is rounded to 16 bits, as on the CPU.
template <class T>
__device__ inline T narrowed(float x) {
  return from_float<T>(x);
}
template <class T>
__device__ inline T narrowed(double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(static_cast<float>(x));
  }
}

// Calls f with a null pointer to the C++ type.
template <class F>
__device__ inline auto with_type(Type type, const F& f) {
  switch (type) {
    case Type::float32:
      return f(static_cast<float*>(nullptr));
    case Type::float64:
      return f(static_cast<double*>(nullptr));
    case Type::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

}  // namespace fastguard
