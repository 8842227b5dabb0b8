#include "simt/tensor_core.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>

namespace simt {

namespace {

// Element `part` of a register.
template <class T>
float element(uint32_t bits, int part) {
  if constexpr (sizeof(T) == 2) {
    return fastguard::to_float(T{static_cast<uint16_t>(bits >> 16 * part)});
  } else {
    return std::bit_cast<float>(bits & ~0x1fffu);  // tf32 has 10 bits of mantissa
  }
}

}  // namespace

MmaOrder drawn_mma_order(uint64_t seed) {
  MmaOrder order;
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  }
  return order;
}

void Launch::ldmatrix(
    uint32_t* to,
    int count,
    bool transposed,
    SharedArray& array,
    int64_t offset,
    const Location& at) {
  struct Row {
    SharedArray* array;
    int64_t offset;
    const Site* site;
  };
  Row mine{&array, offset, nullptr};
  const unsigned lane = running->lane;
  if (lane < 8u * count) {
    Site& site = step(Kind::ldmatrix, 16, at);
    mine.site = &site;
    array.check(offset, 16, at);
    if (options_.count) {
      running->warp->traffic.add(site, lane, array.first_byte + offset);
    }
  }
  const Row* rows = exchange(~0u, mine, Kind::collective, at);
  // Each lane reads what comes into its own registers: if another one changes that without a
  // __syncwarp between, it is a race even where this lane has not run since they met.
  const auto read = [&](unsigned i, unsigned row, unsigned column) {
    const Row& from = rows[8 * i + row];
    const int64_t byte = from.offset + 2 * column;
    from.array->track(byte, 2, Access::read, *running, *from.site, at);
    uint16_t half;
    memcpy(&half, &from.array->bytes[byte], sizeof(half));
    return uint32_t{half};
  };
  const unsigned row = lane / 4;
  const unsigned column = lane % 4 * 2;
  for (int i = 0; i < count; ++i) {
    to[i] = transposed ? read(i, column, row) | read(i, column + 1, row) << 16
                       : read(i, row, column) | read(i, row, column + 1) << 16;
  }
}

template <class T>
void mma(float (&d)[4], const Fragments& mine, const Location& at) {
  constexpr int parts = 4 / sizeof(T);  // elements of a register
  constexpr int depth = 8 * parts;
  const Fragments* lanes = launching->exchange(~0u, mine, Kind::mma, at);
  const int row = static_cast<int>(running->lane) / 4;
  const int column = static_cast<int>(running->lane) % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    float terms[depth + 1];
    for (int k = 0; k < depth; ++k) {
      const int lane = k / parts % 4;
      const int half = k / (4 * parts);
      const float a = element<T>(lanes[row * 4 + lane].a[i / 2 + 2 * half], k % parts);
      const float b = element<T>(lanes[(column + i % 2) * 4 + lane].b[half], k % parts);
      terms[k] = a * b;  // exact
    }
    terms[depth] = d[i];
    float sum = -0.0f;
    for (const int term : launching->mma_order()) {
      if (term <= depth) {
        sum += terms[term];
      }
    }
    d[i] = sum;
  }
}

template void mma<fastguard::BFloat16>(float (&)[4], const Fragments&, const Location&);
template void mma<fastguard::Float16>(float (&)[4], const Fragments&, const Location&);
template void mma<float>(float (&)[4], const Fragments&, const Location&);

namespace {

// y or a neighbour, as x and the seed draw it; y itself if there is no seed.
float off_by_one(float y, float x, uint64_t seed) {
  if (seed == 0 || !std::isfinite(y)) {
    return y;
  }
  const uint64_t drawn = (std::bit_cast<uint32_t>(x) ^ seed) * 0x9e3779b97f4a7c15u >> 62;
  return drawn == 0 ? std::nextafter(y, 0.0f) : drawn == 1 ? std::nextafter(y, INFINITY) : y;
}

}  // namespace

// PTX bounds the relative error by 2^-22 and says no more of it; the same x gives the same y.
float exp2_approx(float x, uint64_t seed) {
  if (std::fabs(x) < FLT_MIN) {
    return 1.0f;
  }
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : std::max(off_by_one(y, x, seed), FLT_MIN);
}

float reciprocal_approx(float x, uint64_t seed) {
  const float y = 1.0f / (std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x);
  return std::fabs(y) < FLT_MIN ? std::copysign(0.0f, y) : off_by_one(y, x, seed);
}

}  // namespace simt

namespace fastguard {

namespace {

const float canonical_nan = std::bit_cast<float>(0x7fffffffu);

}  // namespace

float max_nan(float x, float y) {
  if (x != x || y != y) {
    return canonical_nan;
  }
  return x > y || (x == y && !std::signbit(x)) ? x : y;  // 0 is more than -0
}

float min_nan(float x, float y) {
  if (x != x || y != y) {
    return canonical_nan;
  }
  return x < y || (x == y && std::signbit(x)) ? x : y;
}

}  // namespace fastguard
