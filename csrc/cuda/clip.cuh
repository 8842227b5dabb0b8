// clip_: norm, decision and clipping in one cooperative launch. The blocks meet between the two
// halves; each keeps the last chunk that it measured in shared memory and reads the others again
// from the last to the first, which finds the later ones in L2.
// Reference: clip_ref_ in fastguard/ops.py.
#pragma once

#include "cuda/measure.cuh"
#include "cuda/times.cuh"
#include "decide.h"

namespace fastguard {

constexpr int kept_bytes = chunk_elements * sizeof(float);  // of dynamic shared memory

struct Clipping {
  double max_norm;
  double skip_norm;
  double* clip_coef;  // ()
  int64_t* verdict;  // ()
};

// Whether a chunk's vectors fit into what is kept; of float64 they do not.
__device__ inline bool can_be_kept(const Chunk& chunk) { return chunk.type() != Type::float64; }

__device__ inline void measure_and_keep(
    const Plan& plan, const Norms& out, int c, const Chunk& chunk, Shared<Word16> kept) {
  const bool keep = c + static_cast<int>(gridDim.x) >= plan.n_chunks && can_be_kept(chunk);
  measure_chunk(plan, out, c, chunk, [&](int place, int vectors, const Word16& vector) {
    if (keep && within(place, vectors)) {
      kept[place] = vector;
    }
  });
}

__device__ inline void scale_chunk(
    const Chunk& chunk, double factor, bool is_kept, Shared<Word16> kept) {
  with_type(chunk.type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using V = typename Aligned<T>::V;
    T* x = reinterpret_cast<T*>(chunk.data);
    scale_elements(x, chunk.size(), factor, [&](int place, const V* at) {
      return is_kept ? bits_as<V>(static_cast<Word16>(kept[place])) : load_once(at);
    });
  });
}

__global__ __launch_bounds__(threads, blocks_per_sm) void clip_kernel(Plan plan, Norms out, Clipping clipping) {
  const Shared<Word16> kept = dynamic_shared<Word16>();
  const int grid = static_cast<int>(gridDim.x);
  int c = blockIdx.x;
  for (; c < plan.n_chunks; c += grid) {
    measure_and_keep(plan, out, c, load_chunk(plan.chunks + c), kept);
  }
  double total_norm;
  if (finish(plan, out, total_norm) && threadIdx.x == 0) {
    const Decision decision = decide(total_norm, clipping.max_norm, clipping.skip_norm);
    store(clipping.clip_coef, decision.clip_coef);
    store(clipping.verdict, static_cast<int64_t>(decision.verdict));
  }
  grid_sync();
  const double factor = load(clipping.clip_coef);
  if (factor == 1.0) {
    return;
  }
  bool is_last = true;
  for (c -= grid; c >= 0; c -= grid) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    scale_chunk(chunk, factor, is_last && can_be_kept(chunk), kept);
    is_last = false;
  }
}

}  // namespace fastguard
