// The tensor cores of sm_80 and later: copies from global to shared memory that bypass the
// registers, loads of matrices in the layout of the tensor cores, and products. The kernels use
// only these functions of the tensor cores, and tests/simt has the same functions for the CPU. Each
// function is one instruction. All lanes of a warp must call it together, except for the copies.
#pragma once

#include "cuda/device.cuh"

#ifdef FASTGUARD_SIMT
#include "simt/tensor_core.h"
#else

namespace fastguard {

template <class T>
__device__ inline uint32_t shared_address(Shared<T> pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- asynchronous copies ------------------------------------------------------------------------

// Copies 16 bytes; both addresses are aligned to 16. If not `valid`, it writes zeros and does not
// read `from`, which may be any address. Until the calling thread has waited, no thread may access
// `to` or change `from`. Other threads may read `to` after a barrier that follows the wait.
template <class T>
__device__ inline void copy_async16(Shared<T> to, const T* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Makes the thread's copies since the last commit a group, which may be empty.
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of the thread's groups but the last n have arrived.
template <int n>
__device__ inline void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// --- matrices of 8 rows of 16 bytes -------------------------------------------------------------

// Lane 8 i + r gives the address of row r of matrix i, aligned to 16. Register i of lane l gets
// word l % 4 of row l / 4 of matrix i. With `_trans` it gets the same word of the transposed matrix
// of 16-bit elements. The addresses of lanes after the last matrix are ignored.
template <class T>
__device__ inline void ldmatrix_x1(uint32_t (&to)[1], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(to[0])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ inline void ldmatrix_x1_trans(uint32_t (&to)[1], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(to[0])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ inline void ldmatrix_x2(uint32_t (&to)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ inline void ldmatrix_x2_trans(uint32_t (&to)[2], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ inline void ldmatrix_x4_trans(uint32_t (&to)[4], Shared<T> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- products -----------------------------------------------------------------------------------

// d += a b in float; the order of the sum is not documented. With g = lane / 4, t = lane % 4, and
// two 16-bit elements per register, the lower one first:
//   a, 16 x 16: {(g, 2t), (g, 2t+1)}, {(g+8, 2t), ..}, {(g, 2t+8), ..}, {(g+8, 2t+8), ..}
//   b, 16 x 8:  {(2t, g), (2t+1, g)}, {(2t+8, g), (2t+9, g)}
//   d, 16 x 8:  (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(__is_same(T, BFloat16) || __is_same(T, Float16));
  if constexpr (__is_same(T, BFloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The same for floats; the hardware ignores their low 13 bits:
//   a, 16 x 8: (g, t), (g+8, t), (g, t+4), (g+8, t+4)
//   b, 8 x 8:  (t, g), (t+4, g)
__device__ inline void mma_m16n8k8_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- numbers ------------------------------------------------------------------------------------

// NaN if either is NaN; fmaxf and fminf would drop it.
__device__ inline float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ inline float min_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// 2^x to about 2 units in the last place. A subnormal x or result counts as zero.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place. A subnormal x or result counts as zero.
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two 16-bit elements in a register, for the products, rounded as from_float does.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  static_assert(__is_same(T, BFloat16) || __is_same(T, Float16));
  if constexpr (__is_same(T, BFloat16)) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
  } else {
    return bits_as<uint32_t>(__floats2half2_rn(low, high));
  }
}

}  // namespace fastguard

#endif
