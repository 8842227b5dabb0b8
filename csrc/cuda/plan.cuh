// The plan of a list of tensors: how it is cut into chunks, one record for each, in memory of the
// device. With it one launch serves any number of tensors of mixed dtypes and sizes, and a block
// finds out all about its next chunk with one read of 32 bytes.
//
// The host describes each tensor by an Entry; expand_plan_kernel makes the chunks of it. The
// entries come as kernel arguments: that needs no pinned memory and no event, and a CUDA graph
// keeps them.
#pragma once

#include "adamw_options.h"
#include "cuda/device.cuh"

namespace fastguard {

constexpr int threads = 256;  // of every block
constexpr int chunk_elements = 8192;  // 32 KiB of fp32: eight 16-byte reads of each thread
constexpr int blocks_per_sm = 4;  // at least, of the kernels that stream: 64 KiB on their way to an SM

enum class Type : int { float32, float64, bfloat16, float16 };

struct Entry {
  uint64_t data;
  uint64_t other;  // of a second list, 0 where there is none
  int64_t numel_and_types;  // numel * 16 + other's type * 4 + type
  int32_t first_chunk;
  int32_t place;  // where its packed state starts, in units of packed_alignment
};

struct alignas(16) Chunk {
  uint64_t data;
  uint64_t other;
  int32_t tensor;
  int32_t place;  // of its packed state
  int32_t index;  // in its tensor
  int32_t size_and_types;  // size * 32 + is it the tensor's only one * 16 + types as above

  __host__ __device__ int size() const { return size_and_types >> 5; }
  __host__ __device__ bool only_one() const { return size_and_types & 16; }
  __host__ __device__ Type type() const { return static_cast<Type>(size_and_types & 3); }
  __host__ __device__ Type other_type() const { return static_cast<Type>(size_and_types >> 2 & 3); }
};

// A dimension of a tensor whose memory has no gaps but another order than row-major.
struct alignas(16) PlanDim {
  int64_t stride;
  int64_t row_major_stride;  // what the tensor's stride would be if it were contiguous
};

// What is not finite in a chunk or tensor. `first` is a flat row-major index, -1 if there is none.
struct Nonfinite {
  int64_t nans;
  int64_t infs;
  int64_t first;
};

struct Plan {
  int32_t tensors;
  int32_t n_chunks;
  const Entry* entries;  // (tensors,)
  const int32_t* first_dim;  // (tensors + 1,)
  const PlanDim* dims;
  Chunk* chunks;  // (n_chunks,)
  double* sums;  // (tensors,)
  double* partials;  // (n_chunks,)
  Nonfinite* nonfinite;  // (n_chunks,), written where a partial is not finite
  unsigned* arrived;  // (tensors + 1,): blocks that are done with a tensor, and with everything
};

// Every tensor has a chunk, an empty one too: its results are written as the others' are.
__host__ __device__ inline int64_t chunks_of(int64_t numel) {
  return numel == 0 ? 1 : (numel + chunk_elements - 1) / chunk_elements;
}

__host__ __device__ inline int bytes_of(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

using Word16 = Vector<uint32_t, 4>;

struct ChunkWords {
  Word16 at[2];
};

__device__ inline Chunk load_chunk(const Chunk* chunk) {
  const auto* words = reinterpret_cast<const Word16*>(chunk);
  return bits_as<Chunk>(ChunkWords{{load(words), load(words + 1)}});
}

__device__ inline void store_chunk(Chunk* to, const Chunk& chunk) {
  const auto words = bits_as<ChunkWords>(chunk);
  store(reinterpret_cast<Word16*>(to), words.at[0]);
  store(reinterpret_cast<Word16*>(to) + 1, words.at[1]);
}

// --- building it ----------------------------------------------------------------------------------

constexpr int upload_words = 2000;  // with the rest within 32,764 bytes, the limit of arguments

struct UploadPart {
  Word16 words[upload_words];
};

// Writes a part of the host's description to the device.
__global__ __launch_bounds__(threads) void upload_kernel(
    const __grid_constant__ UploadPart part, Word16* to, int32_t n) {
  for (int i = threadIdx.x; within(i, n); i += threads) {
    store(to + i, part.words[i]);
  }
}

// One block for each tensor.
__global__ __launch_bounds__(threads) void expand_plan_kernel(Plan plan) {
  const int tensor = blockIdx.x;
  const Entry* entry = plan.entries + tensor;
  const uint64_t data = load(&entry->data), other = load(&entry->other);
  const int64_t numel = load(&entry->numel_and_types) >> 4;
  const int types = load(&entry->numel_and_types) & 15;
  const int first = load(&entry->first_chunk), place = load(&entry->place);
  const int64_t n = chunks_of(numel);
  const int bytes = bytes_of(static_cast<Type>(types & 3));
  const int other_bytes = bytes_of(static_cast<Type>(types >> 2 & 3));
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
    chunk.size_and_types = size << 5 | (n == 1) << 4 | types;
    store_chunk(plan.chunks + first + i, chunk);
  }
  if (threadIdx.x == 0) {
    store(plan.arrived + tensor, 0u);
    if (tensor == 0) {
      store(plan.arrived + plan.tensors, 0u);
    }
  }
}

}  // namespace fastguard
