// csrc/cuda/device.cuh for g++: the same names, with the executor behind them.
#pragma once

#include "simt/launch.h"
#include "simt/numbers.h"
#include "simt/shared.h"

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// --- CUDA's own ---------------------------------------------------------------------------------

inline void __syncthreads(const simt::Location& at = simt::Location::current()) {
  simt::launching->barrier(at);
}

inline void __syncwarp(unsigned mask = ~0u, const simt::Location& at = simt::Location::current()) {
  simt::launching->syncwarp(mask, at);
}

inline void __threadfence(const simt::Location& at = simt::Location::current()) {
  simt::launching->fence(at);
}

namespace simt {

template <class T>
concept Word = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// What lane `from` brought to the shuffle, or this lane's own value if that one is of a later group
// of `width`.
template <Word T, class Lane>
T shuffle(unsigned mask, T value, int width, Lane from, const Location& at) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("bad_width", at, "a shuffle of width " + std::to_string(width));
  }
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  const uint64_t* values = launching->exchange(mask, bits, Kind::collective, at);
  const int lane = static_cast<int>(running->lane);
  const int first = lane & -width;
  const int other = from(lane, first);
  memcpy(&value, &values[other < first + width ? other : lane], sizeof(value));
  return value;
}

inline unsigned ballot(unsigned mask, bool predicate, const Location& at) {
  const bool* values = launching->exchange(mask, predicate, Kind::collective, at);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<unsigned>(values[lane]) << lane;
  }
  return votes;
}

}  // namespace simt

template <simt::Word T>
T __shfl_sync(
    unsigned mask,
    T value,
    int lane,
    int width = 32,
    const simt::Location& at = simt::Location::current()) {
  return simt::shuffle(
      mask, value, width, [=](int, int first) { return first + (lane & (width - 1)); }, at);
}

template <simt::Word T>
T __shfl_xor_sync(
    unsigned mask,
    T value,
    int bits,
    int width = 32,
    const simt::Location& at = simt::Location::current()) {
  return simt::shuffle(mask, value, width, [=](int lane, int) { return (lane ^ bits) & 31; }, at);
}

template <simt::Word T>
T __shfl_down_sync(
    unsigned mask,
    T value,
    unsigned distance,
    int width = 32,
    const simt::Location& at = simt::Location::current()) {
  return simt::shuffle(
      mask,
      value,
      width,
      [=](int lane, int) { return lane + static_cast<int>(distance & 31); },
      at);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate, const simt::Location& at = simt::Location::current()) {
  return simt::ballot(mask, predicate != 0, at);
}

inline int __any_sync(
    unsigned mask, int predicate, const simt::Location& at = simt::Location::current()) {
  return simt::ballot(mask, predicate != 0, at) != 0;
}

inline int __all_sync(
    unsigned mask, int predicate, const simt::Location& at = simt::Location::current()) {
  return simt::ballot(mask, predicate != 0, at) == ~0u;
}

namespace simt {

template <class T, class... Types>
concept OneOf = (std::same_as<T, Types> || ...);

// Replaces what is there by what `next` makes of it.
template <class T, class Next>
T atomic(T* address, Next next, const Location& at) {
  launching->atomic(address, sizeof(T), at);
  const T old = *address;
  *address = next(old);
  return old;
}

template <class T, class Next>
T atomic(fastguard::Shared<T> address, Next next, const Location& at) {
  std::byte* bytes =
      launching->shared(*address.array(), address.offset(), sizeof(T), Kind::shared_atomic, at);
  T old;
  memcpy(&old, bytes, sizeof(old));
  const T now = next(old);
  memcpy(bytes, &now, sizeof(now));
  return old;
}

template <class Pointer>  // a T* or a Shared<T>
using ElementOf = typename std::pointer_traits<Pointer>::element_type;

}  // namespace simt

template <class Pointer, class T = simt::ElementOf<Pointer>>
  requires simt::OneOf<T, int, unsigned, unsigned long long, float, double>
T atomicAdd(
    Pointer address,
    std::type_identity_t<T> value,
    const simt::Location& at = simt::Location::current()) {
  return simt::atomic(address, [=](T old) { return static_cast<T>(old + value); }, at);
}

template <class Pointer, class T = simt::ElementOf<Pointer>>
  requires simt::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMin(
    Pointer address,
    std::type_identity_t<T> value,
    const simt::Location& at = simt::Location::current()) {
  return simt::atomic(address, [=](T old) { return std::min(old, value); }, at);
}

template <class Pointer, class T = simt::ElementOf<Pointer>>
  requires simt::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMax(
    Pointer address,
    std::type_identity_t<T> value,
    const simt::Location& at = simt::Location::current()) {
  return simt::atomic(address, [=](T old) { return std::max(old, value); }, at);
}

template <class Pointer, class T = simt::ElementOf<Pointer>>
  requires simt::OneOf<T, int, unsigned, unsigned long long, float>
T atomicExch(
    Pointer address,
    std::type_identity_t<T> value,
    const simt::Location& at = simt::Location::current()) {
  return simt::atomic(address, [=](T) { return value; }, at);
}

template <class Pointer, class T = simt::ElementOf<Pointer>>
  requires simt::OneOf<T, int, unsigned, unsigned long long>
T atomicCAS(
    Pointer address,
    std::type_identity_t<T> expected,
    std::type_identity_t<T> value,
    const simt::Location& at = simt::Location::current()) {
  return simt::atomic(address, [=](T old) { return old == expected ? value : old; }, at);
}

namespace fastguard {

// --- global memory ------------------------------------------------------------------------------

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T at[n];
};

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
constexpr bool is_word =
    sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

template <class T>
T load(const T* address, const simt::Location& at = simt::Location::current()) {
  static_assert(is_word<T>);
  T value;
  simt::launching->load(&value, address, sizeof(value), at);
  return value;
}

template <class T>
void store(T* address, T value, const simt::Location& at = simt::Location::current()) {
  static_assert(is_word<T>);
  simt::launching->store(address, &value, sizeof(value), at);
}

template <class T>
T load_once(const T* address, const simt::Location& at = simt::Location::current()) {
  return load(address, at);
}

template <class T>
void store_once(T* address, T value, const simt::Location& at = simt::Location::current()) {
  store(address, value, at);
}

inline bool within(int64_t i, int64_t n, const simt::Location& at = simt::Location::current()) {
  return simt::launching->within(i, n, at);
}

// --- shared memory ------------------------------------------------------------------------------

// The key is a variable of the declaration's own: each instance of a template has another one.
#define FASTGUARD_SHARED(Type, name, count) \
  static const char name##_key = 0;         \
  const ::fastguard::Shared<Type> name(     \
      &::simt::running->block->shared.array(&name##_key, #name, sizeof(Type) * (count)), 0)

template <class T>
Shared<T> dynamic_shared(int offset = 0) {
  return {&simt::launching->dynamic_shared(), offset};
}

inline void grid_sync(const simt::Location& at = simt::Location::current()) {
  simt::launching->grid_sync(at);
}

}  // namespace fastguard
