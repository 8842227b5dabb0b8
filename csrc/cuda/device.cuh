// The machine as the kernels see it: the only file with intrinsics that differ between a GPU and
// tests/simt, the executor that runs the same kernels on the CPU. Of CUDA itself the kernels use
// __global__, __device__, __launch_bounds__, threadIdx, blockIdx, blockDim, gridDim,
// __syncthreads, __syncwarp, __shfl_xor_sync, __shfl_sync, __ballot_sync, __threadfence and
// atomicAdd, atomicMin; of shared memory only what is declared here; and no address of global
// memory is read or written but through load and store.
#pragma once

#ifdef FASTGUARD_SIMT
#include "simt/device.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace fastguard {

// --- global memory ------------------------------------------------------------------------------

// What one instruction moves: n elements, 16 bytes at the most, aligned to their size.
template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};

template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// By value: a memcpy by way of a reference into memory reads it byte after byte.
template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// An address that comes out of memory, as those in a plan do, could be of any kind for what the
// compiler knows: it is told that the memory is global, and takes LDG and STG for LD and ST.
template <class T>
__device__ inline T load(const T* address) {
  using W = typename Word<sizeof(T)>::type;
  __builtin_assume(__isGlobal(address));
  return bits_as<T>(*reinterpret_cast<const W*>(address));
}

template <class T>
__device__ inline void store(T* address, T value) {
  using W = typename Word<sizeof(T)>::type;
  __builtin_assume(__isGlobal(address));
  *reinterpret_cast<W*>(address) = bits_as<W>(value);
}

// The same for data that is not wanted in the caches: it makes way first.
template <class T>
__device__ inline T load_once(const T* address) {
  using W = typename Word<sizeof(T)>::type;
  return bits_as<T>(__ldcs(reinterpret_cast<const W*>(address)));
}

template <class T>
__device__ inline void store_once(T* address, T value) {
  using W = typename Word<sizeof(T)>::type;
  __stcs(reinterpret_cast<W*>(address), bits_as<W>(value));
}

// Whether element i of n exists. Every bound that keeps a thread off memory that is not its own is
// written with it, so that tests/simt can take it away and see that this is noticed.
__device__ inline bool within(int64_t i, int64_t n) { return i < n; }

// --- shared memory ------------------------------------------------------------------------------

template <class T>
using Shared = T*;

// An array of the block's, not initialised.
#define FASTGUARD_SHARED(Type, name, count) __shared__ Type name[count]

// What the launch asked for, aligned to 16 bytes, from byte `offset` on.
template <class T>
__device__ inline Shared<T> dynamic_shared(int offset = 0) {
  extern __shared__ uint4 fastguard_dynamic_shared[];
  return reinterpret_cast<T*>(reinterpret_cast<char*>(fastguard_dynamic_shared) + offset);
}

// All threads of all blocks of a cooperative launch meet here and see what the others wrote.
__device__ inline void grid_sync() { cooperative_groups::this_grid().sync(); }

// --- numbers ------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(BFloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
__device__ inline float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// To nearest, ties to even; an overflow is Inf, a NaN stays one.
template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (__is_same(T, BFloat16)) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
  }
}

}  // namespace fastguard

#endif
