// The plan of a list of tensors: one record in the device's memory for each chunk of them. With a
// plan one launch serves any number of tensors of mixed dtypes and sizes. One read of 32 bytes
// tells a block everything about its next chunk.
//
// The host describes each tensor by an Entry; build_plan.cuh makes chunks from it.
#pragma once

#include "adamw_options.h"
#include "cuda/device.cuh"
#include "nonfinite.h"
#include "permutation.h"

namespace fastguard {

constexpr int threads = 256;  // of every block
constexpr int chunk_elements = 8192;  // 32 KiB of fp32: eight 16-byte reads of each thread
// The kernels' registers are limited so that this many blocks fit on an SM, with 64 KiB of loads in
// flight. (clip_ has 3 blocks on an SM with 100 KiB of shared memory.)
constexpr int blocks_per_sm = 4;

enum class Type : int { float32, float64, bfloat16, float16, byte };

struct Entry {
  uint64_t data;
  uint64_t other;  // the tensor of a second list; 0 without one
  int64_t numel_and_types;  // numel * 64 + other's type * 8 + type
  int32_t first_chunk;
  int32_t place;  // the start of its packed state, in units of packed_alignment
};

struct alignas(16) Chunk {
  uint64_t data;
  uint64_t other;
  int32_t tensor;
  int32_t place;  // the start of its packed state, in units of packed_alignment
  int32_t index;  // in its tensor
  int32_t size_and_types;  // size * 128 + whether the tensor has one chunk * 64 + types as above

  __host__ __device__ int size() const { return size_and_types >> 7; }
  __host__ __device__ bool only_one() const { return size_and_types & 64; }
  __host__ __device__ Type type() const { return static_cast<Type>(size_and_types & 7); }
  __host__ __device__ Type other_type() const { return static_cast<Type>(size_and_types >> 3 & 7); }
};

struct Plan {
  int32_t tensors;
  int32_t n_chunks;
  const Entry* entries;  // (tensors,)
  const int32_t* first_dim;  // (tensors + 1,)
  const PermutedDim* dims;
  Chunk* chunks;  // (n_chunks,)
  double* sums;  // (tensors,)
  double* partials;  // (n_chunks,)
  Nonfinite* nonfinite;  // (n_chunks,), written where a partial is not finite
  unsigned* arrived;  // (tensors + 1,): chunks of each tensor that are done, and blocks that are
};

// Every tensor has a chunk, even an empty one, because its results have to be written too.
__host__ __device__ inline int64_t chunks_of(int64_t numel) {
  return numel == 0 ? 1 : (numel + chunk_elements - 1) / chunk_elements;
}

__host__ __device__ inline int bytes_of(Type type) {
  // One digit for each type. nvcc would turn a switch of five cases into a jump table in memory.
  return 0x12284 >> 4 * static_cast<int>(type) & 15;
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

constexpr int upload_words = 2000;  // with the rest within 32,764 bytes, the limit of arguments

struct UploadPart {
  Word16 words[upload_words];
};

}  // namespace fastguard
