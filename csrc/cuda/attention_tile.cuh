// Tiles of attention's rows in shared memory, and their products on tensor cores.
//
// A block has 4 warps. Each warp owns 16 or 32 rows of the block's own tile. It multiplies them
// with all rows of the other tiles, one tile after the other, and keeps the results in its
// registers. The 16 x 8 results of mma have the layout of its first operand of 16 x 16 elements.
// The weights of one product are therefore the operand of the next one without a change (Dao 2023,
// arXiv 2307.08691).
#pragma once

#include "cuda/tensor_core.cuh"

namespace fastguard {

constexpr int attention_threads = 128;
constexpr int attention_warps = attention_threads / 32;
constexpr int strip_rows = 16;  // the rows of an mma

template <class T>
constexpr int elements_of_16_bytes = 16 / static_cast<int>(sizeof(T));

using Bytes16 = Vector<uint32_t, 4>;

// Rows of D elements in dynamic shared memory, from byte `offset` on, in chunks of 16 bytes. The
// chunks of one column of 8 consecutive rows are in different banks, and so are any 8 chunks of a
// row. The order of the chunks depends on the row: on its pair of rows if it has 4 or 12 chunks,
// else on the row itself.
template <class T, int D>
struct RowTile {
  static constexpr int chunks = D / elements_of_16_bytes<T>;
  static_assert(chunks % 4 == 0);
  static constexpr int row_bytes = chunks * 16;

  template <class W = T>
  __device__ Shared<W> at(int row, int chunk) const {
    const int turn = chunks % 8 == 0 ? row % 8 : row / 2 % 4;
    return dynamic_shared<W>(offset + row * row_bytes + (chunk ^ turn) * 16);
  }

  int offset;
};

// Elements (B, heads, rows, columns) whose columns are contiguous.
template <class T>
struct Heads {
  T* first;
  int64_t batch, head, row;  // strides

  __device__ T* of(int b, int h) const { return first + b * batch + h * head; }
  template <class W>
  __device__ W* row_of(int b, int h, int i) const {
    return reinterpret_cast<W*>(of(b, h) + i * row);
  }
};

// Starts the copies of rows, with zeros for rows that do not exist and for columns from `width` on.
// `width` is a multiple of the elements of 16 bytes.
template <int rows, class T, int D, class Exists>
__device__ void copy_rows(
    RowTile<T, D> tile, const T* first, int64_t stride, int width, Exists exists) {
  constexpr int chunks = RowTile<T, D>::chunks;
  static_assert(rows * chunks % attention_threads == 0);
#pragma unroll
  for (int turn = 0; turn < rows * chunks / attention_threads; ++turn) {
    const int i = turn * attention_threads + threadIdx.x;
    const int row = i / chunks, chunk = i % chunks;
    const int column = chunk * elements_of_16_bytes<T>;
    const bool valid = within(column, width) && exists(row);
    copy_async16(tile.at(row, chunk), first + row * stride + column, valid);
  }
}

// Writes the warp's rows, which have the layout of an mma's result, to its own rows of a tile, and
// from there to memory in units of 16 bytes. The index is in units of 16 bytes too: with another
// unit nvcc stores word by word for sm_80 and sm_90.
template <class T, int D, int strips>
__device__ void store_rows(
    const float (&d)[strips][D / 8][4],
    RowTile<T, D> tile,
    int row,
    T* to,
    int64_t stride,
    int64_t count,
    int width) {
  constexpr int chunks = RowTile<T, D>::chunks;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes have read the old values
#pragma unroll
  for (int i = 0; i < strips * D / 4; ++i) {
    const int m = i / (D / 4), column = i / 2 % (D / 8), half = i % 2;
    const float low = d[m][column][2 * half], high = d[m][column][2 * half + 1];
    const int place = row + m * strip_rows + half * 8 + lane / 4;
    if constexpr (sizeof(T) == 2) {
      tile.template at<uint32_t>(place, column)[lane % 4] = pack<T>(low, high);
    } else {
      tile.template at<Vector<float, 2>>(place, 2 * column + lane % 4 / 2)[lane % 2] =
          Vector<float, 2>{low, high};
    }
  }
  __syncwarp();
#pragma unroll
  for (int turn = 0; turn < strips * strip_rows * chunks / 32; ++turn) {
    const int i = turn * 32 + lane;
    const int place = row + i / chunks, chunk = i % chunks;
    const int column = chunk * elements_of_16_bytes<T>;
    if (within(place, count) && within(column, width)) {
      const Bytes16 values = tile.template at<Bytes16>(place, chunk)[0];
      store(reinterpret_cast<Bytes16*>(to + place * stride) + chunk, values);
    }
  }
}

// d += a b^T for the warp's rows of a, from `row` on, and 8 n rows of b.
template <class T, int D, int strips, int n>
__device__ void multiply_rows(float (&d)[strips][n][4], RowTile<T, D> a, int row, RowTile<T, D> b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t of_a[strips][4];
#pragma unroll
    for (int m = 0; m < strips; ++m) {
      ldmatrix_x4(of_a[m], a.at(row + m * strip_rows + lane % 16, 2 * step + lane / 16));
    }
#pragma unroll
    for (int pair = 0; pair < n / 2; ++pair) {
      uint32_t of_b[4];
      ldmatrix_x4(of_b, b.at(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < strips; ++m) {
        mma_m16n8k16<T>(d[m][2 * pair], of_a[m], {of_b[0], of_b[1]});
        mma_m16n8k16<T>(d[m][2 * pair + 1], of_a[m], {of_b[2], of_b[3]});
      }
    }
  }
}

// d += p b, with 8 n rows of b and p in the layout of multiply_rows' result.
template <class T, int D, int strips, int n>
__device__ void multiply_columns(
    float (&d)[strips][D / 8][4], const float (&p)[strips][n][4], RowTile<T, D> b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < n / 2; ++step) {
    uint32_t of_p[strips][4];
#pragma unroll
    for (int i = 0; i < strips * 4; ++i) {
      const float (&from)[4] = p[i / 4][2 * step + i % 4 / 2];
      of_p[i / 4][i % 4] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      uint32_t of_b[4];
      ldmatrix_x4_trans(of_b, b.at(16 * step + lane % 16, 2 * pair + lane / 16));
#pragma unroll
      for (int m = 0; m < strips; ++m) {
        mma_m16n8k16<T>(d[m][2 * pair], of_p[m], {of_b[0], of_b[1]});
        mma_m16n8k16<T>(d[m][2 * pair + 1], of_p[m], {of_b[2], of_b[3]});
      }
    }
  }
}

}  // namespace fastguard
