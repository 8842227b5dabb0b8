// A transposed copy through shared memory. A row of 32 floats is one pass over the banks, so a
// column of such rows lies in one bank; a row of 33 spreads it over all.
#pragma once

#include "cuda/device.cuh"

namespace fastguard {

constexpr int tile = 32;
constexpr int tile_rows = 8;  // rows that the block of 32 x 8 threads moves at a time

template <int row>
__global__ void transpose_kernel(const float* from, float* to, int64_t rows, int64_t columns) {
  FASTGUARD_SHARED(float, staged, tile* row);
  const int x = threadIdx.x;
  const int64_t top = int64_t{blockIdx.y} * tile;
  const int64_t left = int64_t{blockIdx.x} * tile;
  for (int y = threadIdx.y; y < tile; y += tile_rows) {
    if (within(top + y, rows) && within(left + x, columns)) {
      staged[y * row + x] = load(from + (top + y) * columns + left + x);
    }
  }
  __syncthreads();
  for (int y = threadIdx.y; y < tile; y += tile_rows) {
    if (within(left + y, columns) && within(top + x, rows)) {
      store<float>(to + (left + y) * rows + top + x, staged[x * row + y]);
    }
  }
}

}  // namespace fastguard
