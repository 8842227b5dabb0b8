// This source is compiled once per instruction set, which FASTGUARD_CAPABILITY names. The results
// of all are bitwise equal.

#include "gradients_kernel.h"

#include "concat.h"
#include "vector.h"

#include <algorithm>

namespace fastguard {
namespace {

constexpr int lanes = 8;

// sum_squares
//
// Why double: the square of a finite fp32, bf16 or fp16 value is exact in double, and the sum of
// 2^63 largest squares is finite. So nothing overflows or underflows, and a sum that is not finite
// shows an element that is not finite: the verdict needs no instruction of its own. For fp64 input
// the sum can overflow, as torch's can; grad_norm.cpp distinguishes the two cases.
//
// Why a fixed number of lanes: every instruction set adds the same numbers in the same order, so
// the results are bitwise equal. The file is compiled without contraction. FMA is used only for
// exact products, where it changes nothing but the time.
//
// Why strips: one core that reads one stream does not reach the memory's bandwidth. Four streams
// and a prefetch reduced the time of the loop from 1.5x of a plain read to 1.0x
// (bench/norm_kernel.py). At the end of a strip the prefetch goes on where the strip of the next
// slice begins: the thread takes that slice next, most of the time.

constexpr int strips = 4;
constexpr int cache_line = 64;
constexpr int prefetch_bytes = 2048;

template <class Type>
inline void add_square(double& sum, double value) {
#if defined(__FMA__) || defined(FASTGUARD_NEON)
  if constexpr (!std::is_same_v<Type, Float64>) {
    sum = __builtin_fma(value, value, sum);
    return;
  }
#endif
  sum += value * value;
}

template <class Type>
inline void add_squares(double (&sums)[lanes], const typename Type::storage* x) {
#if defined(__F16C__) || defined(FASTGUARD_NEON)
  if constexpr (std::is_same_v<Type, Float16>) {
    float values[lanes];
    widen8(x, values);
    for (int lane = 0; lane < lanes; ++lane) {
      add_square<Type>(sums[lane], values[lane]);
    }
    return;
  }
#endif
  for (int lane = 0; lane < lanes; ++lane) {
    add_square<Type>(sums[lane], Type::widen(x[lane]));
  }
}

inline void prefetch(const void* address, int64_t bytes = prefetch_bytes) {
#if defined(__GNUC__)
  __builtin_prefetch(static_cast<const char*>(address) + bytes);
#else
  (void)address, (void)bytes;
#endif
}

template <class Type>
double sum_squares(const void* data, int64_t n) {
  using Storage = typename Type::storage;
  constexpr int64_t step = cache_line / sizeof(Storage);
  const auto* x = static_cast<const Storage*>(data);
  const int64_t strip = n / (strips * step) * step;
  double sums[strips][lanes] = {};
  const auto add_lines = [&](int64_t begin, int64_t end, int64_t ahead) {
    for (int64_t i = begin; i < end; i += step) {
      for (int s = 0; s < strips; ++s) {
        const Storage* line = x + s * strip + i;
        prefetch(line, ahead);
        for (int64_t group = 0; group < step; group += lanes) {
          add_squares<Type>(sums[s], line + group);
        }
      }
    }
  };
  const int64_t bytes = sizeof(Storage);
  const int64_t inside = std::max<int64_t>(strip - prefetch_bytes / bytes, 0);
  add_lines(0, inside, prefetch_bytes);
  add_lines(inside, strip, prefetch_bytes + (n - strip) * bytes);
  for (int64_t i = strips * strip; i < n; ++i) {
    add_square<Type>(sums[0][i % lanes], Type::widen(x[i]));
  }
  double total = 0.0;
  for (int lane = 0; lane < lanes; ++lane) {
    total += (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]);
  }
  return total;
}

// scale

template <class Type>
void scale(void* data, int64_t n, double factor) {
  constexpr int64_t step = cache_line / sizeof(typename Type::storage);
  auto* x = static_cast<typename Type::storage*>(data);
  int64_t i = 0;
  if constexpr (!std::is_same_v<Type, Float64>) {
    for (; i + step <= n; i += step) {
      prefetch(x + i);
      for (auto* part = x + i; part < x + i + step; part += Floats::lanes) {
        store_as<Type>(product(load_as<float, Type>(part), factor), part);
      }
    }
  }
  for (; i < n; ++i) {
    x[i] = Type::narrow(Type::widen(x[i]) * factor);
  }
}

// add

template <class Type>
void add(void* sum, const void* grad, int64_t n) {
  using Sum = std::conditional_t<std::is_same_v<Type, Float64>, double, float>;
  constexpr int64_t step = cache_line / sizeof(float);
  auto* x = static_cast<Sum*>(sum);
  const auto* y = static_cast<const typename Type::storage*>(grad);
  int64_t i = 0;
  if constexpr (!std::is_same_v<Type, Float64>) {
    for (; i + step <= n; i += step) {
      prefetch(x + i);
      prefetch(y + i);
      for (int64_t j = i; j < i + step; j += Floats::lanes) {
        (Floats::load(x + j) + load_as<float, Type>(y + j)).store(x + j);
      }
    }
  }
  for (; i < n; ++i) {
    x[i] += static_cast<Sum>(Type::widen(y[i]));
  }
}

}  // namespace

extern const GradientKernels FASTGUARD_CONCAT(gradient_kernels_, FASTGUARD_CAPABILITY) = {
    {sum_squares<Float32>, sum_squares<Float64>, sum_squares<BFloat16>, sum_squares<Float16>},
    {scale<Float32>, scale<Float64>, scale<BFloat16>, scale<Float16>},
    {add<Float32>, add<Float64>, add<BFloat16>, add<Float16>}};

}  // namespace fastguard
