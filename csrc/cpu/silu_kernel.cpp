// One source, compiled once per instruction set with FASTGUARD_CAPABILITY as its name.

#include "silu_kernel.h"

#include "concat.h"
#include "strips.h"

namespace fastguard {
namespace {

template <class Type>
using Computed = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;

template <class Type>
void forward(const void* x, void* output, int64_t n) {
  using T = Computed<Type>;
  const auto* const from = static_cast<const typename Type::storage*>(x);
  auto* const to = static_cast<typename Type::storage*>(output);
  for (int64_t i = 0; i < n; i += Vec<T>::lanes) {
    store_part<T, Type>(silu(load_part<T, Type>(from + i, n - i)), to + i, n - i);
  }
}

template <class Type>
void backward(const void* grad_output, const void* x, void* grad_x, int64_t n) {
  using T = Computed<Type>;
  const auto* const grad = static_cast<const typename Type::storage*>(grad_output);
  const auto* const from = static_cast<const typename Type::storage*>(x);
  auto* const to = static_cast<typename Type::storage*>(grad_x);
  for (int64_t i = 0; i < n; i += Vec<T>::lanes) {
    const Vec<T> slope = silu_slope(load_part<T, Type>(from + i, n - i));
    store_part<T, Type>(load_part<T, Type>(grad + i, n - i) * slope, to + i, n - i);
  }
}

}  // namespace

extern const SiluKernels FASTGUARD_CONCAT(silu_kernels_, FASTGUARD_CAPABILITY) = {
    {forward<Float32>, forward<Float64>, forward<BFloat16>, forward<Float16>},
    {backward<Float32>, backward<Float64>, backward<BFloat16>, backward<Float16>}};

}  // namespace fastguard
