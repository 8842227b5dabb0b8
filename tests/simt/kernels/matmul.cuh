// A product of matrices on tensor cores, c = a b: the pattern of an attention kernel's two.
//
// A block makes 64 x 64 elements of c, each of its 4 warps 16 rows. It steps through the depth by
// 128 bytes of a row of `a`; while it multiplies one pair of tiles, the next is on its way.
#pragma once

#include "cuda/tensor_core.cuh"

namespace fastguard {

constexpr int matmul_threads = 128;
constexpr int matmul_tile = 64;  // rows and columns of c

// A tile in shared memory: 64 rows of 8 chunks of 16 bytes. One row passes over all 32 banks, so
// the chunks of a column lie in the same 4; `swizzled` moves them apart, and then any 8 rows of a
// column and any 8 chunks of a row are one pass.
constexpr int tile_chunks = 8;
constexpr int tile_bytes = matmul_tile * tile_chunks * 16;
constexpr int matmul_shared = 2 * 2 * tile_bytes;

template <class T>
constexpr int chunk_elements = 16 / static_cast<int>(sizeof(T));

template <class T, bool swizzled>
struct Tile {
  Shared<T> first;

  __device__ Shared<T> at(int row, int chunk) const {
    const int place = swizzled ? chunk ^ row % tile_chunks : chunk;
    return first + (row * tile_chunks + place) * chunk_elements<T>;
  }
};

// Brings the tile at (top, left) of a matrix on its way; zeros stand for what is outside. Both
// `columns` and `left` are multiples of what 16 bytes hold.
template <class T, bool swizzled>
__device__ void copy_tile(
    Tile<T, swizzled> tile,
    const T* matrix,
    int64_t rows,
    int64_t columns,
    int64_t top,
    int64_t left) {
  for (int i = threadIdx.x; i < matmul_tile * tile_chunks; i += matmul_threads) {
    const int64_t row = top + i / tile_chunks;
    const int64_t column = left + i % tile_chunks * chunk_elements<T>;
    const bool row_exists = within(row, rows);
    const bool column_exists = within(column, columns);
    copy_async16(
        tile.at(i / tile_chunks, i % tile_chunks),
        matrix + row * columns + column,
        row_exists && column_exists);
  }
}

template <class T>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    mma_m16n8k8_tf32(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
}

// The registers of b for the 32 bytes of depth from chunk 2 `step` on, and columns 16 `pair` to
// 16 `pair` + 15: two of the 8-column matrices that an mma takes. A tile of `b_rows` holds rows of
// b, of which ldmatrix makes columns, and else the columns of b as its rows.
template <bool b_rows, class T, bool swizzled>
__device__ void load_b(uint32_t (&to)[4], Tile<T, swizzled> b, int step, int pair) {
  const int lane = threadIdx.x % 32;
  if constexpr (b_rows) {
    ldmatrix_x4_trans(to, b.at(16 * step + lane % 16, 2 * pair + lane / 16));
  } else {
    ldmatrix_x4(to, b.at(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  }
}

template <bool b_rows, class T, bool swizzled>
__device__ void multiply_tiles(float (&d)[8][4], Tile<T, swizzled> a, Tile<T, swizzled> b) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 0; step < tile_chunks / 2; ++step) {
    uint32_t of_a[4];
    ldmatrix_x4(of_a, a.at(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t of_b[4];
      load_b<b_rows>(of_b, b, step, pair);
      multiply<T>(d[2 * pair], of_a, {of_b[0], of_b[1]});
      multiply<T>(d[2 * pair + 1], of_a, {of_b[2], of_b[3]});
    }
  }
}

template <class T>
__device__ void store_tile(const float (&d)[8][4], T* c, int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % 32;
  const int64_t top = int64_t{blockIdx.y} * matmul_tile + threadIdx.x / 32 * 16 + lane / 4;
  const int64_t left = int64_t{blockIdx.x} * matmul_tile + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int64_t row = top + i % 4 / 2 * 8;
    const int64_t column = left + i / 4 * 8 + i % 2;
    if (within(row, rows) && within(column, columns)) {
      store(c + row * columns + column, from_float<T>(d[i / 4][i % 4]));
    }
  }
}

// a: rows x depth. b: depth x columns if `b_rows`, else columns x depth (all that ldmatrix can do
// for floats, since it transposes 16-bit elements only). c: rows x columns.
template <class T, bool b_rows, bool swizzled>
__global__ void __launch_bounds__(matmul_threads)
    matmul_kernel(const T* a, const T* b, T* c, int64_t rows, int64_t columns, int64_t depth) {
  static_assert(sizeof(T) == 2 || !b_rows);
  constexpr int step = tile_chunks * chunk_elements<T>;
  const int64_t top = int64_t{blockIdx.y} * matmul_tile;
  const int64_t left = int64_t{blockIdx.x} * matmul_tile;
  const int tiles = static_cast<int>((depth + step - 1) / step);
  const auto tile = [](int i) { return Tile<T, swizzled>{dynamic_shared<T>(i * tile_bytes)}; };
  const auto copy = [&](int i) {
    copy_tile(tile(i % 2), a, rows, depth, top, int64_t{i} * step);
    if constexpr (b_rows) {
      copy_tile(tile(2 + i % 2), b, depth, columns, int64_t{i} * step, left);
    } else {
      copy_tile(tile(2 + i % 2), b, columns, depth, left, int64_t{i} * step);
    }
  };

  float d[8][4] = {};
  copy(0);
  commit_async();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      copy(i + 1);
    }
    commit_async();  // in the last turn an empty group, so that the wait below is for tile i too
    wait_async<1>();
    __syncthreads();
    multiply_tiles<b_rows>(d, tile(i % 2), tile(2 + i % 2));
    __syncthreads();  // the next turn fills these tiles anew
  }
  store_tile(d, c, rows, columns);
}

}  // namespace fastguard
