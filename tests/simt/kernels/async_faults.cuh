// What must not be done with asynchronous copies and the collectives of tensor cores. Each is
// launched as one block of 64 threads with 1024 bytes of dynamic shared memory, on 256 floats.
#pragma once

#include "cuda/tensor_core.cuh"

namespace fastguard {

__device__ inline void copy_own(const float* x, bool valid = true) {
  copy_async16(dynamic_shared<float>() + threadIdx.x * 4, x + threadIdx.x * 4, valid);
}

__device__ inline void arrive_own(const float* x) {
  copy_own(x);
  commit_async();
  wait_async<0>();
}

__global__ void read_before_the_wait(float* x) {
  copy_own(x);
  commit_async();
  store<float>(x, dynamic_shared<float>()[threadIdx.x * 4]);
}

__global__ void others_read_before_the_wait(float* x) {
  copy_own(x);
  commit_async();
  __syncthreads();
  store<float>(x, dynamic_shared<float>()[(threadIdx.x ^ 1) * 4]);
}

__global__ void read_before_the_barrier(float* x) {
  arrive_own(x);
  const float other = dynamic_shared<float>()[(threadIdx.x ^ 32) * 4];
  __syncthreads();
  store(x, other);
}

// Neither the barrier, which came too early, nor the shuffle orders lane 0's copy with the others.
__global__ void barrier_before_the_wait(float* x) {
  if (threadIdx.x == 0) {
    copy_own(x);
    commit_async();
  }
  __syncthreads();
  wait_async<0>();
  __shfl_sync(0xffffffffu, 0, 0);
  if (threadIdx.x == 1) {
    store<float>(x, dynamic_shared<float>()[0]);
  }
}

__global__ void wait_for_too_few(float* x) {
  copy_own(x);
  commit_async();
  wait_async<1>();
  store<float>(x, dynamic_shared<float>()[threadIdx.x * 4]);
}

__global__ void wait_without_a_commit(float* x) {
  copy_own(x);
  wait_async<0>();
  store<float>(x, dynamic_shared<float>()[threadIdx.x * 4]);
}

__global__ void fill_what_is_being_filled(float* x) {
  copy_own(x);
  copy_own(x);
  commit_async();
  wait_async<0>();
}

__global__ void fill_what_others_read(float* x) {
  arrive_own(x);
  __syncthreads();
  const float other = dynamic_shared<float>()[(threadIdx.x ^ 32) * 4];
  arrive_own(x);
  store(x, other);
}

__global__ void change_the_source(float* x) {
  copy_own(x);
  store(x + threadIdx.x * 4, 1.0f);
  commit_async();
  wait_async<0>();
}

__global__ void end_before_the_wait(float* x) {
  copy_own(x);
  commit_async();
}

__global__ void end_before_zeros_arrive(float* x) { copy_own(x, false); }

__global__ void copy_from_beyond(float* x) { arrive_own(x + 4); }

__global__ void copy_from_across(float* x) { arrive_own(x + 1); }

__global__ void copy_to_beyond(float* x) { copy_async16(dynamic_shared<float>() + 256, x, true); }

__global__ void copy_to_across(float* x) { copy_async16(dynamic_shared<float>() + 1, x, true); }

__global__ void ldmatrix_beyond(float*) {
  uint32_t to[4];
  ldmatrix_x4(to, dynamic_shared<float>() + 256);
}

__global__ void ldmatrix_across(float*) {
  uint32_t to[4];
  ldmatrix_x4(to, dynamic_shared<float>(8));
}

// All lanes have met before, but not since each has written its row.
__global__ void ldmatrix_without_syncwarp(float*) {
  using Row = Vector<float, 4>;
  const Shared<Row> rows = dynamic_shared<Row>();
  rows[threadIdx.x] = Row{};
  uint32_t to[4];
  ldmatrix_x4(to, rows + threadIdx.x);
}

__global__ void overwrite_what_ldmatrix_reads(float*) {
  using Row = Vector<float, 4>;
  const Shared<Row> rows = dynamic_shared<Row>();
  rows[threadIdx.x] = Row{};
  __syncwarp();
  uint32_t to[4];
  ldmatrix_x4(to, rows + threadIdx.x);
  rows[threadIdx.x] = Row{};
}

__global__ void half_at_the_ldmatrix(float*) {
  uint32_t to[4];
  if (threadIdx.x % 2 == 0) {
    ldmatrix_x4(to, dynamic_shared<float>());
  } else {
    __syncwarp();
  }
}

__global__ void other_mma(float*) {
  float d[4] = {};
  const uint32_t zero[4] = {};
  if (threadIdx.x % 32 < 16) {
    mma_m16n8k16<BFloat16>(d, zero, {0, 0});
  } else {
    mma_m16n8k16<BFloat16>(d, zero, {0, 0});
  }
}

__global__ void half_a_warp_ends_before_the_mma(float*) {
  if (threadIdx.x % 32 < 16) {
    return;
  }
  float d[4] = {};
  mma_m16n8k8_tf32(d, {0, 0, 0, 0}, {0, 0});
}

}  // namespace fastguard
