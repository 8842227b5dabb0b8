// The kernels' interface to the machine. This is the only file with intrinsics that differ between
// a GPU and tests/simt, the executor that runs the same kernels on the CPU. Beside it the kernels
// use only these names of CUDA: __global__, __device__, __launch_bounds__, threadIdx, blockIdx,
// blockDim, gridDim, __syncthreads, __syncwarp, __shfl_xor_sync, __shfl_sync, __ballot_sync,
// __threadfence, atomicAdd and atomicMin. They use shared memory only as declared here, and they
// access global memory only through load and store.
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

// n elements that one instruction moves: at most 16 bytes, aligned to their size.
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

// The argument is a value: a memcpy from a reference into memory would read it byte by byte.
template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The compiler does not know the kind of memory of an address that was read from memory, such as
// those of a plan. The assumption that it is global memory gives LDG and STG in place of LD and ST.
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

// The same for data that is not needed again: the caches evict it first.
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

// Whether element i of n exists. Every bound check of the kernels calls this function, so
// tests/simt can disable one and test that the executor notices it.
__device__ inline bool within(int64_t i, int64_t n) { return i < n; }

// --- shared memory ------------------------------------------------------------------------------

template <class T>
using Shared = T*;

// An uninitialised array of the block.
#define FASTGUARD_SHARED(Type, name, count) __shared__ Type name[count]

// The dynamic shared memory of the launch, aligned to 16 bytes, from byte `offset` on.
template <class T>
__device__ inline Shared<T> dynamic_shared(int offset = 0) {
  extern __shared__ uint4 fastguard_dynamic_shared[];
  return reinterpret_cast<T*>(reinterpret_cast<char*>(fastguard_dynamic_shared) + offset);
}

// A barrier for all threads of a cooperative launch. Afterwards they see what the others wrote.
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

// Rounds to nearest, ties to even. An overflow is Inf, and a NaN stays a NaN.
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
