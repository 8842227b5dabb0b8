// The attention weights that dropout keeps. They depend only on the seed and on the index of the
// weight, so CPU, GPU, forward and backward agree for all sizes of tiles. Reference:
// dropout_keep_ref in fastguard/ops/philox.py.
//
// The generator is Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")
// with 7 rounds, the fewest that pass BigCrush there. A call gives 8 numbers of 16 bits in the
// layout of the accumulators of mma.m16n8k16. In a tile of 16 x 16 weights, call 4 g + t (g < 8,
// t < 4) decides about rows g + 8 r and columns 8 n + 2 t + c (r, n, c < 2) by half c (0: the lower
// one) of word 2 n + r. One thread of a warp therefore uses all numbers that it draws. The words of
// calls 4 g to 4 g + 3 side by side are the numbers of 8 columns in order.
#pragma once

#include "host_device.h"

#include <cmath>
#include <cstdint>

namespace fastguard {

// The functions are static, because files of several instruction sets include this: the linker
// would keep one copy of an inline function with linkage for all.

constexpr int philox_rounds = 7;
constexpr uint32_t philox_m0 = 0xD2511F53, philox_m1 = 0xCD9E8D57;
constexpr uint32_t philox_w0 = 0x9E3779B9, philox_w1 = 0xBB67AE85;
constexpr int dropout_tile = 16;  // rows and columns
constexpr int dropout_calls = 32;  // for each tile

struct Random128 {
  uint32_t at[4];
};

FASTGUARD_HOST_DEVICE static inline Random128 philox(Random128 counter, uint64_t key) {
  uint32_t keys[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < philox_rounds; ++round) {
    const uint64_t a = uint64_t{philox_m0} * counter.at[0];
    const uint64_t b = uint64_t{philox_m1} * counter.at[2];
    counter = {
        static_cast<uint32_t>(b >> 32) ^ counter.at[1] ^ keys[0],
        static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ counter.at[3] ^ keys[1],
        static_cast<uint32_t>(a)};
    keys[0] += philox_w0;
    keys[1] += philox_w1;
  }
  return counter;
}

// The numbers of call `call` of the tile at (16 row_tile, 16 column_tile). `head` is b H + h.
FASTGUARD_HOST_DEVICE static inline Random128 dropout_draw(
    const int64_t seed[2], int64_t head, int64_t row_tile, int64_t column_tile, int call) {
  const Random128 counter{
      static_cast<uint32_t>(row_tile * dropout_calls + call),
      static_cast<uint32_t>(column_tile),
      static_cast<uint32_t>(head),
      static_cast<uint32_t>(seed[1])};
  return philox(counter, static_cast<uint64_t>(seed[0]));
}

// A weight is kept if its number is below `threshold`, and multiplied by `rescale`.
struct Dropout {
  uint32_t threshold;
  float rescale;
};

FASTGUARD_HOST_DEVICE static inline Dropout dropout_of(double dropout_p) {
  const double kept = std::floor((1.0 - dropout_p) * 65536.0 + 0.5);
  const double threshold = kept < 1.0 ? 1.0 : kept;
  return {static_cast<uint32_t>(threshold), static_cast<float>(65536.0 / threshold)};
}

}  // namespace fastguard
