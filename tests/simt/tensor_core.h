// csrc/cuda/tensor_core.cuh for g++: the same names, with the executor behind them.
#pragma once

#include "simt/device.h"

namespace simt {

// The inputs of one product, in registers of one lane.
struct Fragments {
  uint32_t a[4], b[2];
};

// `T`: BFloat16, Float16, or float for tf32.
template <class T>
void mma(float (&d)[4], const Fragments& mine, const Location& at);

// Off by as much as the hardware may be, if there is a seed.
float exp2_approx(float x, uint64_t seed);
float reciprocal_approx(float x, uint64_t seed);

template <int count, class T>
void ldmatrix(
    uint32_t (&to)[count], fastguard::Shared<T> row, bool transposed, const Location& at) {
  launching->ldmatrix(to, count, transposed, *row.array(), row.offset(), at);
}

}  // namespace simt

namespace fastguard {

// --- asynchronous copies ------------------------------------------------------------------------

template <class T>
void copy_async16(
    Shared<T> to, const T* from, bool valid, const simt::Location& at = simt::Location::current()) {
  simt::launching->copy_async(*to.array(), to.offset(), from, valid, at);
}

inline void commit_async() { simt::launching->commit_async(); }

template <int n>
void wait_async(const simt::Location& at = simt::Location::current()) {
  static_assert(n >= 0);
  simt::launching->wait_async(n, at);
}

// --- matrices of 8 rows of 16 bytes -------------------------------------------------------------

template <class T>
void ldmatrix_x1(
    uint32_t (&to)[1], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, false, at);
}

template <class T>
void ldmatrix_x1_trans(
    uint32_t (&to)[1], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, true, at);
}

template <class T>
void ldmatrix_x2(
    uint32_t (&to)[2], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, false, at);
}

template <class T>
void ldmatrix_x2_trans(
    uint32_t (&to)[2], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, true, at);
}

template <class T>
void ldmatrix_x4(
    uint32_t (&to)[4], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, false, at);
}

template <class T>
void ldmatrix_x4_trans(
    uint32_t (&to)[4], Shared<T> row, const simt::Location& at = simt::Location::current()) {
  simt::ldmatrix(to, row, true, at);
}

// --- products -----------------------------------------------------------------------------------

template <simt::OneOf<BFloat16, Float16> T>
void mma_m16n8k16(
    float (&d)[4],
    const uint32_t (&a)[4],
    const uint32_t (&b)[2],
    const simt::Location& at = simt::Location::current()) {
  simt::mma<T>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, at);
}

inline void mma_m16n8k8_tf32(
    float (&d)[4],
    const uint32_t (&a)[4],
    const uint32_t (&b)[2],
    const simt::Location& at = simt::Location::current()) {
  simt::mma<float>(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, at);
}

// --- numbers ------------------------------------------------------------------------------------

float max_nan(float x, float y);
float min_nan(float x, float y);

inline float exp2_approx(float x) { return simt::exp2_approx(x, simt::launching->seed()); }
inline float reciprocal_approx(float x) {
  return simt::reciprocal_approx(x, simt::launching->seed());
}

template <simt::OneOf<BFloat16, Float16> T>
uint32_t pack(float low, float high) {
  return uint32_t{from_float<T>(high).bits} << 16 | from_float<T>(low).bits;
}

}  // namespace fastguard
