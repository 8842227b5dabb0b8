// clip_: norm, decision and clipping in one cooperative launch, with a barrier of all blocks before
// the clipping. Each block keeps the last chunk that it measured in shared memory. It reads the
// others again from the last to the first, so the later ones are still in L2.
// Reference: clip_ref_ in fastguard/ops/clip.py.
#pragma once

#include "cuda/measure.cuh"
#include "cuda/times.cuh"
#include "decide.h"

namespace fastguard {

constexpr int kept_bytes = chunk_elements * sizeof(float);  // of dynamic shared memory

struct Clipping {
  double max_norm;
  double skip_norm;
  bool float32_norm;
  double* clip_coef;  // ()
  int64_t* verdict;  // ()
};

// Whether the vectors of a chunk fit into the shared memory; those of float64 do not.
__device__ inline bool can_be_kept(const Chunk& chunk) { return chunk.type() != Type::float64; }

__device__ inline void measure_and_keep(
    const Plan& plan, const Norms& out, int c, const Chunk& chunk, Shared<Word16> kept) {
  const bool keep = c + static_cast<int>(gridDim.x) >= plan.n_chunks && can_be_kept(chunk);
  measure_chunk(plan, out, c, chunk, [&](int place, const Word16& vector) {
    if (keep) {
      kept[place] = vector;
    }
  });
}

template <class Read>
__device__ inline void scale_chunk(const Chunk& chunk, double factor, const Read& vector) {
  with_type(chunk.type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    scale_elements(reinterpret_cast<T*>(chunk.data), chunk.size(), factor, vector);
  });
}

__global__ __launch_bounds__(threads, blocks_per_sm) void clip_kernel(
    Plan plan, Norms out, Clipping clipping) {
  const Shared<Word16> kept = dynamic_shared<Word16>();
  const int grid = static_cast<int>(gridDim.x);
  int c = blockIdx.x;
  for (; c < plan.n_chunks; c += grid) {
    measure_and_keep(plan, out, c, load_chunk(plan.chunks + c), kept);
  }
  double total_norm;
  if (finish(plan, out, total_norm) && threadIdx.x == 0) {
    const double norm = as_returned(total_norm, clipping.float32_norm);
    const Decision decision = decide(norm, clipping.max_norm, clipping.skip_norm);
    store(clipping.clip_coef, decision.clip_coef);
    store(clipping.verdict, static_cast<int64_t>(decision.verdict));
  }
  grid_sync();
  const double factor = load(clipping.clip_coef);
  if (factor == 1.0) {
    return;
  }
  // The kept chunk has its own loop. A loop that chose between both sources would wait for the
  // first vector before it loads the next one.
  c -= grid;
  if (c >= 0) {
    const Chunk chunk = load_chunk(plan.chunks + c);
    if (can_be_kept(chunk)) {
      scale_chunk(chunk, factor, [&](int place, const Word16*) {
        return static_cast<Word16>(kept[place]);
      });
      c -= grid;
    }
  }
  for (; c >= 0; c -= grid) {
    const auto read = [](int, const Word16* at) { return load_once(at); };
    scale_chunk(load_chunk(plan.chunks + c), factor, read);
  }
}

}  // namespace fastguard
