// The products of attention's tiles for float32: multiply-adds of the ordinary units in the layout
// of the tensor cores, which would drop 13 bits. All other code is the same for both.
//
// A lane reads 16 bytes of rows, which 3 or 7 other lanes read too, for 4 multiply-adds of each of
// its 2 strips n elements. By count this needs about half of the bandwidth of shared memory.
#pragma once

#include "cuda/attention_tile.cuh"

#include <cmath>

namespace fastguard {

template <int D, int strips, int n>
__device__ void multiply_rows(
    float (&d)[strips][n][4], RowTile<float, D> a, int row, RowTile<float, D> b) {
  using Four = Vector<float, 4>;
  const int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
#pragma unroll 1
  for (int chunk = 0; chunk < D / 4; ++chunk) {
    Four of_a[strips][2];
#pragma unroll
    for (int i = 0; i < strips * 2; ++i) {
      of_a[i / 2][i % 2] =
          a.template at<Four>(row + i / 2 * strip_rows + i % 2 * 8 + group, chunk)[0];
    }
#pragma unroll
    for (int column = 0; column < 2 * n; ++column) {
      const int place = column / 2 * 8 + 2 * in_group + column % 2;
      const Four of_b = b.template at<Four>(place, chunk)[0];
#pragma unroll
      for (int i = 0; i < strips * 8; ++i) {
        const int m = i / 8, half = i / 4 % 2;
        float& sum = d[m][column / 2][2 * half + column % 2];
        sum = fmaf(of_a[m][half].at[i % 4], of_b.at[i % 4], sum);
      }
    }
  }
}

template <int D, int strips, int n>
__device__ void multiply_columns(
    float (&d)[strips][D / 8][4], const float (&p)[strips][n][4], RowTile<float, D> b) {
  using Two = Vector<float, 2>;
  const int in_group = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 2 * n; ++j) {
#pragma unroll 1
    for (int owner = 0; owner < 4; ++owner) {
      float weight[strips][2];
#pragma unroll
      for (int i = 0; i < strips * 2; ++i) {
        weight[i / 2][i % 2] =
            __shfl_sync(0xffffffffu, p[i / 2][j / 2][i % 2 * 2 + j % 2], owner, 4);
      }
      const int row = j / 2 * 8 + 2 * owner + j % 2;
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
        const Two of_b = b.template at<Two>(row, 2 * column + in_group / 2)[in_group % 2];
#pragma unroll
        for (int i = 0; i < strips * 4; ++i) {
          float& sum = d[i / 4][column][i % 4];
          sum = fmaf(weight[i / 4][i % 4 / 2], of_b.at[i % 2], sum);
        }
      }
    }
  }
}

}  // namespace fastguard
