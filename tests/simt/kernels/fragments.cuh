// One tensor-core instruction each, with all registers of all lanes in and out.
#pragma once

#include "cuda/tensor_core.cuh"

namespace fastguard {

template <int count, bool transposed, class Row>
__device__ void ldmatrix(uint32_t (&to)[count], Shared<Row> row) {
  if constexpr (count == 1) {
    transposed ? ldmatrix_x1_trans(to, row) : ldmatrix_x1(to, row);
  } else if constexpr (count == 2) {
    transposed ? ldmatrix_x2_trans(to, row) : ldmatrix_x2(to, row);
  } else {
    transposed ? ldmatrix_x4_trans(to, row) : ldmatrix_x4(to, row);
  }
}

// `rows`: 32 of 16 bytes. Lane l brings the address of row l * stride % 32, and that of lanes which
// bring none to an instruction of fewer matrices lies outside of shared memory.
template <int count, bool transposed>
__global__ void ldmatrix_kernel(const Vector<uint16_t, 8>* rows, int stride, uint32_t* registers) {
  const Shared<Vector<uint16_t, 8>> staged = dynamic_shared<Vector<uint16_t, 8>>();
  const int lane = threadIdx.x;
  staged[lane] = load(rows + lane);
  __syncwarp();
  uint32_t to[count];
  ldmatrix<count, transposed>(to, staged + (lane < 8 * count ? lane * stride % 32 : 1000));
  for (int i = 0; i < count; ++i) {
    store(registers + lane * count + i, to[i]);
  }
}

// T: float for tf32.
template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t of_a[4];
  uint32_t of_b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    of_a[i] = load(a + lane * 4 + i);
    of_b[i % 2] = load(b + lane * 2 + i % 2);
    sum[i] = load(d + lane * 4 + i);
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    mma_m16n8k8_tf32(sum, of_a, of_b);
  } else {
    mma_m16n8k16<T>(sum, of_a, of_b);
  }
  for (int i = 0; i < 4; ++i) {
    store(d + lane * 4 + i, sum[i]);
  }
}

__global__ void numbers_kernel(
    const float* x,
    const float* y,
    int n,
    float* most,
    float* least,
    float* power,
    float* inverse) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (within(i, n)) {
    store(most + i, max_nan(load(x + i), load(y + i)));
    store(least + i, min_nan(load(x + i), load(y + i)));
    store(power + i, exp2_approx(load(x + i)));
    store(inverse + i, reciprocal_approx(load(x + i)));
  }
}

template <class T>
__global__ void pack_kernel(const float* x, int n, uint32_t* packed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (within(i, n)) {
    store(packed + i, pack<T>(load(x + 2 * i), load(x + 2 * i + 1)));
  }
}

}  // namespace fastguard
