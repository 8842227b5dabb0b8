// The norm of every tensor, the counts of its NaNs and Infs with the index of the first one, and
// the global norm.
//
// Blocks take chunks in turns. The block that finishes the last chunk of a tensor adds up the sums
// of its chunks, in the order of the chunks. The last block of all adds up the tensors. The results
// therefore do not depend on the number of blocks or on their order.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/squares.cuh"

#include <cmath>

namespace fastguard {

struct Norms {
  double* total_norm;  // ()
  double* norms;  // (tensors,)
  int64_t* nonfinite;  // (tensors, 3): NaNs, Infs, first index
};

__device__ inline int64_t row_major_index(const Plan& plan, int tensor, int64_t offset) {
  const int begin = load(plan.first_dim + tensor), end = load(plan.first_dim + tensor + 1);
  const auto of_device = [](const int64_t* number) { return load(number); };
  return row_major_index(plan.dims, begin, end, offset, of_device);
}

__device__ inline Nonfinite block_together(const Nonfinite& mine) {
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  const auto least = [](int64_t a, int64_t b) {
    return static_cast<uint64_t>(a) < static_cast<uint64_t>(b) ? a : b;
  };
  return {
      block_reduce(mine.nans, add), block_reduce(mine.infs, add), block_reduce(mine.first, least)};
}

// A second read of a chunk whose sum is not finite; it is in the cache.
__device__ inline Nonfinite find_nonfinite(const Plan& plan, const Chunk& chunk) {
  return with_type(chunk.type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = reinterpret_cast<const T*>(chunk.data);
    Nonfinite found;
    for (int i = threadIdx.x; within(i, chunk.size()); i += threads) {
      const auto value = widened(load(x + i));
      if (!std::isfinite(value)) {
        const int64_t offset = int64_t{chunk.index} * chunk_elements + i;
        const int64_t place = row_major_index(plan, chunk.tensor, offset);
        found = together(found, {std::isnan(value), std::isinf(value), place});
      }
    }
    return block_together(found);
  });
}

__device__ inline void write_tensor(
    const Plan& plan, const Norms& out, int tensor, double sum, const Nonfinite& found) {
  if (threadIdx.x == 0) {
    store(plan.sums + tensor, sum);
    store(out.norms + tensor, sqrt(sum));
    store(out.nonfinite + 3 * tensor, found.nans);
    store(out.nonfinite + 3 * tensor + 1, found.infs);
    store(out.nonfinite + 3 * tensor + 2, found.first);
  }
}

// Adds up the sums of a tensor's chunks, after the last of them is there.
__device__ inline void sum_tensor(
    const Plan& plan, const Norms& out, int tensor, int first, int n) {
  double sum = 0.0;
  Nonfinite found;
  for (int c = threadIdx.x; within(c, n); c += threads) {
    const double partial = load(plan.partials + first + c);
    sum += partial;
    if (!std::isfinite(partial)) {
      const Nonfinite* of_chunk = plan.nonfinite + first + c;
      found =
          together(found, {load(&of_chunk->nans), load(&of_chunk->infs), load(&of_chunk->first)});
    }
  }
  sum = block_sum(sum);
  if (!std::isfinite(sum)) {
    found = block_together(found);
  }
  write_tensor(plan, out, tensor, sum, found);
}

template <class See>
__device__ inline void measure_chunk(
    const Plan& plan, const Norms& out, int c, const Chunk& chunk, const See& see) {
  const double share = with_type(chunk.type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return sum_squares(reinterpret_cast<const T*>(chunk.data), chunk.size(), see);
  });
  const double sum = block_sum(share);
  Nonfinite found;
  if (!std::isfinite(sum)) {
    found = find_nonfinite(plan, chunk);
  }
  if (chunk.only_one()) {
    write_tensor(plan, out, chunk.tensor, sum, found);
    return;
  }
  if (threadIdx.x == 0) {
    store(plan.partials + c, sum);
    if (!std::isfinite(sum)) {
      store(&plan.nonfinite[c].nans, found.nans);
      store(&plan.nonfinite[c].infs, found.infs);
      store(&plan.nonfinite[c].first, found.first);
    }
  }
  const int n = static_cast<int>(chunks_of(load(&plan.entries[chunk.tensor].numel_and_types) >> 6));
  if (arrives_last(plan.arrived + chunk.tensor, n)) {
    sum_tensor(plan, out, chunk.tensor, c - chunk.index, n);
  }
}

// True in the last block, which then has the total norm.
__device__ inline bool finish(const Plan& plan, const Norms& out, double& total_norm) {
  if (!arrives_last(plan.arrived + plan.tensors, gridDim.x)) {
    return false;
  }
  double sum = 0.0;
  for (int tensor = threadIdx.x; within(tensor, plan.tensors); tensor += threads) {
    sum += load(plan.sums + tensor);
  }
  total_norm = sqrt(block_sum(sum));
  if (threadIdx.x == 0) {
    store(out.total_norm, total_norm);
  }
  return true;
}

}  // namespace fastguard
