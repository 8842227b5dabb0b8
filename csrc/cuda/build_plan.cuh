// Builds a plan on the device from the host's description of the tensors. The description comes as
// kernel arguments, which need no pinned memory and no event, and which a CUDA graph keeps.
#pragma once

#include "cuda/plan.cuh"

namespace fastguard {

// Writes a part of the host's description to the device.
__global__ __launch_bounds__(threads) void upload_kernel(
    const __grid_constant__ UploadPart part, Word16* to, int32_t n) {
  const int i = static_cast<int>(blockIdx.x) * threads + threadIdx.x;
  if (within(i, n)) {
    store(to + i, part.words[i]);
  }
}

// One block for each tensor, and one for the counter of all blocks.
__global__ __launch_bounds__(threads) void expand_plan_kernel(Plan plan) {
  const int tensor = blockIdx.x;
  if (tensor == plan.tensors) {
    if (threadIdx.x == 0) {
      store(plan.arrived + tensor, 0u);
    }
    return;
  }
  const Entry* entry = plan.entries + tensor;
  const uint64_t data = load(&entry->data), other = load(&entry->other);
  const int64_t numel = load(&entry->numel_and_types) >> 6;
  const int types = load(&entry->numel_and_types) & 63;
  const int first = load(&entry->first_chunk), place = load(&entry->place);
  const int64_t n = chunks_of(numel);
  const int bytes = bytes_of(static_cast<Type>(types & 7));
  const int other_bytes = bytes_of(static_cast<Type>(types >> 3 & 7));
  for (int64_t i = threadIdx.x; within(i, n); i += threads) {
    const int64_t begin = i * chunk_elements;
    const int64_t left = numel - begin;
    Chunk chunk;
    chunk.data = data + begin * bytes;
    chunk.other = other + begin * other_bytes;
    chunk.tensor = tensor;
    chunk.place = place + static_cast<int32_t>(begin / packed_alignment);
    chunk.index = static_cast<int32_t>(i);
    const int size = static_cast<int>(left < chunk_elements ? left : chunk_elements);
    chunk.size_and_types = size << 7 | (n == 1) << 6 | types;
    store_chunk(plan.chunks + first + i, chunk);
  }
  if (threadIdx.x == 0) {
    store(plan.arrived + tensor, 0u);
  }
}

}  // namespace fastguard
