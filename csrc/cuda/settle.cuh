// settle_: copies the saved values back into all buffers on a skip, and into the buffers of an
// owner if one of them was finite in its copy and is not finite now. Else it updates the copies.
// Reference: settle_ref_ in fastguard/ops/settle.py.
#pragma once

#include "cuda/reduce.cuh"
#include "decide.h"
#include "finite.h"

namespace fastguard {

// Checks this thread's share of the n elements. A buffer is aligned only to the size of its
// elements.
template <class Word>
__device__ inline int any_lost(uint64_t now, uint64_t saved, int n, Word exponent) {
  int any = 0;
  for (int i = threadIdx.x; within(i, n); i += threads) {
    const Word x = load(reinterpret_cast<const Word*>(now) + i);
    any |= lost(x, load(reinterpret_cast<const Word*>(saved) + i), exponent);
  }
  return any;
}

// A choice by size, because nvcc would turn a choice among all types into a jump table.
__device__ inline int any_lost(const Chunk& chunk) {
  const Type type = chunk.type();
  if (type == Type::byte) {
    return 0;
  }
  if (bytes_of(type) == 8) {
    return any_lost(chunk.data, chunk.other, chunk.size(), exponent_of_float64);
  }
  if (bytes_of(type) == 4) {
    return any_lost(chunk.data, chunk.other, chunk.size(), exponent_of_float32);
  }
  const bool bfloat16 = type == Type::bfloat16;
  const uint16_t exponent = bfloat16 ? exponent_of_bfloat16 : exponent_of_float16;
  return any_lost(chunk.data, chunk.other, chunk.size(), exponent);
}

// The number of a buffer's owner. The host cannot check the numbers without a sync. A buffer whose
// number is out of range is its own owner.
__device__ inline int64_t owner_of(const Plan& plan, const int64_t* owners, int buffer) {
  const int64_t owner = load(owners + buffer);
  return 0 <= owner && owner < plan.tensors ? owner : buffer;
}

// lost: for each buffer, then for each owner, the number of chunks with a lost element; 0 on a
// skip.
__global__ __launch_bounds__(threads) void find_lost_kernel(
    Plan plan, const int64_t* verdict, const int64_t* owners, unsigned* lost) {
  const bool skip = skips(load(verdict));
  for (int c = blockIdx.x; !skip && c < plan.n_chunks; c += gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    const int any = block_reduce(any_lost(chunk), [](int a, int b) { return a | b; });
    if (threadIdx.x == 0 && any != 0) {
      atomicAdd(lost + chunk.tensor, 1u);
      atomicAdd(lost + plan.tensors + owner_of(plan, owners, chunk.tensor), 1u);
    }
  }
}

template <class Unit>
__device__ inline void copy_units(uint64_t to, uint64_t from, int n) {
  for (int i = threadIdx.x; within(i, n); i += threads) {
    store(reinterpret_cast<Unit*>(to) + i, load(reinterpret_cast<const Unit*>(from) + i));
  }
}

// Copies the buffers as bytes, for any dtype.
__global__ __launch_bounds__(threads) void settle_kernel(
    Plan plan, const int64_t* verdict, const int64_t* owners, const unsigned* lost) {
  const bool skip = skips(load(verdict));
  for (int c = blockIdx.x; c < plan.n_chunks; c += gridDim.x) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    const bool restore =
        skip || load(lost + plan.tensors + owner_of(plan, owners, chunk.tensor)) != 0;
    const uint64_t to = restore ? chunk.data : chunk.other;
    const uint64_t from = restore ? chunk.other : chunk.data;
    const int bytes = chunk.size() * bytes_of(chunk.type());
    const int whole = (to | from) % 16 == 0 ? bytes / 16 : 0;
    copy_units<Word16>(to, from, whole);
    copy_units<uint8_t>(to + 16 * whole, from + 16 * whole, bytes - 16 * whole);
  }
}

}  // namespace fastguard
