// Elements times a factor, in place.
#pragma once

#include "cuda/squares.cuh"

namespace fastguard {

// The product in float64, rounded once, as on the CPU: a factor of 1e-43 scales 1e38 down without
// the loss of a bit. It takes three instructions of the fp64 units per element. These may limit the
// speed for 16-bit elements on a GPU with 1/64 as many fp64 units as fp32 units. Such gradients are
// scaled only in a step that clips, and with an optimizer other than fastguard's.
template <class T>
__device__ inline T times(T x, double factor) {
  return narrowed<T>(widened(x) * factor);
}

template <class T>
__device__ inline Vector<T, 16 / sizeof(T)> times(Vector<T, 16 / sizeof(T)> x, double factor) {
#pragma unroll
  for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
    x.at[i] = times(x.at[i], factor);
  }
  return x;
}

// `vector(place, address)` returns a whole vector.
template <class T, class Read>
__device__ inline void scale_elements(T* x, int n, double factor, const Read& vector) {
  const Aligned<T> aligned(x, n);
  auto* body = const_cast<Word16*>(aligned.body);
  for (int base = 0; base < aligned.vectors; base += reads_at_a_time * threads) {
    Word16 read[reads_at_a_time];
#pragma unroll
    for (int i = 0; i < reads_at_a_time; ++i) {
      const int place = base + i * threads + threadIdx.x;
      read[i] = {};  // otherwise the values of the last pass occupy registers
      if (within(place, aligned.vectors)) {
        read[i] = vector(place, body + place);
      }
    }
#pragma unroll
    for (int i = 0; i < reads_at_a_time; ++i) {
      const int place = base + i * threads + threadIdx.x;
      if (within(place, aligned.vectors)) {
        const auto scaled = times<T>(bits_as<typename Aligned<T>::V>(read[i]), factor);
        store(body + place, bits_as<Word16>(scaled));
      }
    }
  }
  const int at = threadIdx.x;
  if (within(at, aligned.head)) {
    store(x + at, times(load(x + at), factor));
  }
  if (within(aligned.tail() + at, n)) {
    store(x + aligned.tail() + at, times(load(x + aligned.tail() + at), factor));
  }
}

}  // namespace fastguard
