// The sum of squares of a chunk, from one read in 16-byte pieces.
//
// The arithmetic is fp32: except on the largest GPUs, the fp64 units are slower than the memory.
// The square of a finite fp32 or bf16 value may overflow or underflow in fp32. The squares are
// therefore summed three times: unscaled, scaled down and scaled up. The sum that kept its digits
// counts. This is the method of Blue, "A Portable Fortran Program to Find the Euclidean Norm of a
// Vector", TOMS 1978, without its branches. It takes five instructions per element. A thread sums
// 32 elements in this way, and the sums of threads are added in float64. A sum that is not finite
// shows an element that is not finite.
#pragma once

#include "cuda/elements.cuh"

#include <cmath>

namespace fastguard {

template <class T>
struct Squares {  // fp32 and bf16
  float middle = 0.0f;
  float large = 0.0f;
  float small = 0.0f;

  __device__ void add(T x) {
    const float value = to_float(x);
    const float down = value * 0x1p-80f;
    const float up = value * 0x1p100f;
    middle = fmaf(value, value, middle);
    large = fmaf(down, down, large);
    small = fmaf(up, up, small);
  }

  __device__ void add(const Squares& other) {
    middle += other.middle;
    large += other.large;
    small += other.small;
  }

  __device__ double total() const {
    if (!(middle <= 0x1.fffffep127f)) {  // an overflow, or an Inf or NaN, which `large` keeps
      return static_cast<double>(large) * 0x1p160;
    }
    // Below this limit every element is under 2^-40, and its scaled-up square is under 2^120.
    return middle >= 0x1p-80f ? middle : static_cast<double>(small) * 0x1p-200;
  }
};

template <>
struct Squares<Float16> {  // squares from 2^-48 to 2^32 need no scale
  float sum = 0.0f;

  __device__ void add(Float16 x) {
    const float value = to_float(x);
    sum = fmaf(value, value, sum);
  }
  __device__ void add(const Squares& other) { sum += other.sum; }
  __device__ double total() const { return sum; }
};

template <>
struct Squares<double> {
  double sum = 0.0;

  __device__ void add(double x) { sum = fma(x, x, sum); }
  __device__ void add(const Squares& other) { sum += other.sum; }
  __device__ double total() const { return sum; }
};

constexpr int reads_at_a_time = 4;  // by each thread: 16 KiB in flight for a block

// n elements as a head of less than 16 bytes, whole 16-byte vectors, and a tail of less than 16
// bytes.
//
// The vectors are words until the computation. For vectors of 16-bit elements nvcc would select
// each half (the loaded value or zero) with an instruction of its own. These wait for the first
// vector before the last one is loaded.
template <class T>
struct Aligned {
  static constexpr int width = 16 / sizeof(T);
  using V = Vector<T, width>;

  int head;
  int vectors;
  const Word16* body;

  __device__ Aligned(const T* x, int n) {
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
    head = before < n ? before : n;
    vectors = (n - head) / width;
    body = reinterpret_cast<const Word16*>(x + head);
  }
  __device__ int tail() const { return head + vectors * width; }  // where it begins
};

// This thread's share of the sum over a chunk. `see(place, vector)` is called for every vector, and
// with zeros for some places after the last one. All places are below chunk_elements * sizeof(T) /
// 16.
template <class T, class See>
__device__ inline double sum_squares(const T* x, int n, const See& see) {
  const Aligned<T> aligned(x, n);
  constexpr int width = Aligned<T>::width;
  Squares<T> sums[2];
  for (int base = 0; base < aligned.vectors; base += reads_at_a_time * threads) {
    Word16 read[reads_at_a_time];
#pragma unroll
    for (int i = 0; i < reads_at_a_time; ++i) {
      const int place = base + i * threads + threadIdx.x;
      read[i] = {};
      if (within(place, aligned.vectors)) {
        read[i] = load(aligned.body + place);
      }
    }
#pragma unroll
    for (int i = 0; i < reads_at_a_time; ++i) {
      see(base + i * threads + threadIdx.x, read[i]);
      const auto vector = bits_as<typename Aligned<T>::V>(read[i]);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        sums[j % 2].add(vector.at[j]);
      }
    }
  }
  const int at = threadIdx.x;
  if (within(at, aligned.head)) {
    sums[0].add(load(x + at));
  }
  if (within(aligned.tail() + at, n)) {
    sums[1].add(load(x + aligned.tail() + at));
  }
  sums[0].add(sums[1]);
  return sums[0].total();
}

}  // namespace fastguard
