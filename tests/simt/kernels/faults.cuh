// One kernel for each thing that the executor must not let pass. Each is launched as one block of
// 64 threads with 128 bytes of dynamic shared memory, on 64 floats.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

__global__ void load_beyond(float* x) { store(x, load(x + threadIdx.x + 1)); }

__global__ void load_before(float* x) { load(x - 1); }

__global__ void load_across(float* x) { load(reinterpret_cast<Vector<float, 4>*>(x + 1)); }

__global__ void shared_beyond(float*) { dynamic_shared<float>()[threadIdx.x] = 0.0f; }

__global__ void shared_before(float*) { dynamic_shared<float>()[-1] = 0.0f; }

__global__ void shared_across(float*) { dynamic_shared<float>(2)[0] = 0.0f; }

__global__ void write_after_write(float*) { dynamic_shared<float>()[threadIdx.x / 64] = 0.0f; }

__global__ void read_after_write(float* x) {
  const Shared<uint16_t> halves = dynamic_shared<uint16_t>();
  halves[threadIdx.x] = uint16_t{0};
  store<float>(x + threadIdx.x, halves[threadIdx.x ^ 1]);
}

__global__ void write_after_read(float* x) {
  const Shared<uint16_t> halves = dynamic_shared<uint16_t>();
  const float read = halves[threadIdx.x ^ 32];
  __syncwarp();
  halves[threadIdx.x] = uint16_t{0};
  store(x + threadIdx.x, read);
}

// A shuffle lets the lanes of a warp meet, and yet orders nothing in memory.
__global__ void shuffle_is_no_fence(float* x) {
  const Shared<uint16_t> halves = dynamic_shared<uint16_t>();
  halves[threadIdx.x] = uint16_t{0};
  __shfl_sync(0xffffffffu, 0, 0);
  store<float>(x + threadIdx.x, halves[threadIdx.x ^ 1]);
}

__global__ void atomic_and_plain(float* x) {
  const Shared<int> count = dynamic_shared<int>();
  atomicAdd(count, 1);
  store(x + threadIdx.x, static_cast<float>(count[0]));
}

__global__ void other_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void other_collective(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffffu, 1);
  }
}

__global__ void lane_ends_first(float*) {
  if (threadIdx.x % 2 == 0) {
    return;
  }
  __syncwarp();
}

__global__ void lane_ends_last(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  }
}

__global__ void half_at_the_barrier(float*) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  }
  __syncwarp();
  if (threadIdx.x % 2 == 1) {
    __syncthreads();
  }
}

__global__ void half_a_mask(float*) { __shfl_sync(0x0000ffffu, 0, 0); }

__global__ void odd_width(float*) { __shfl_xor_sync(0xffffffffu, 0, 1, 12); }

__global__ void grid_sync_alone(float*) { grid_sync(); }

__global__ void no_end(float* x) {
  while (load(x) == 0.0f) {
  }
}

// Of two blocks.
__global__ void blocks_disagree(float* x) { store(x, static_cast<float>(blockIdx.x)); }

}  // namespace fastguard
