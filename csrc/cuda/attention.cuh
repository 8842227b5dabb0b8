// The arguments of attention's kernels, and their operations on a tile of logits: scale and
// softcap, masks, dropout. Reference: attention_ref in fastguard/ops/attention.py.
//
// A tile has the layout of mma's results: with g = lane / 4 and t = lane % 4, element [m][i][j] has
// row 16 m + g + 8 (j / 2) and column 8 i + 2 t + j % 2. With `keys_are_rows` the rows are keys and
// the columns are queries; else the rows are queries. Logits are in units of log 2, for exp2, and
// -inf for hidden keys.
#pragma once

#include "cuda/attention_tile.cuh"
#include "philox.h"

#include <cmath>
#include <type_traits>

namespace fastguard {

// Calls call(std::integral_constant<int, D>) with the smallest width D that kernels are compiled
// for and that holds `width` columns.
constexpr int most_kernel_width = 128;

template <class T, class Call>
void with_width(int width, Call call) {
  if constexpr (sizeof(T) == 2) {
    if (width <= 32) {
      return call(std::integral_constant<int, 32>());
    }
    if (width > 64 && width <= 96) {
      return call(std::integral_constant<int, 96>());
    }
  }
  return width <= 64 ? call(std::integral_constant<int, 64>())
                     : call(std::integral_constant<int, most_kernel_width>());
}

constexpr float log2_e = 1.44269504f;
constexpr float log_2 = 0.693147181f;

// A pointer is null if there is no such mask. Strides are in elements.
struct AttentionMasks {
  const uint8_t* padding;  // (B, S), 1: hidden
  int64_t padding_batch, padding_key;
  const uint8_t* shown;  // (B, H, T, S), 0: hidden
  const float* added;  // (B, H, T, S) with the same strides
  const void* narrow;  // the same of the operands' type, where that has 16 bits
  int64_t batch, head, query, key;
  bool is_causal;

  __device__ bool of_each_logit() const {
    return shown != nullptr || added != nullptr || narrow != nullptr;
  }
};

struct Attention {
  int heads, kv_heads, queries, keys, head_dim, value_dim;
  float scale;
  float softcap;  // 0: none
  float clamp;  // inf: none
  Dropout dropout;
  const int64_t* seed;  // of dropout; null: none
  AttentionMasks masks;

  __device__ int kv_head(int head) const { return head / (heads / kv_heads); }
  // The end of the keys that the `count` queries from `query` on may see.
  __device__ int keys_end(int query, int count) const {
    return masks.is_causal && query + count < keys ? query + count : keys;
  }
};

// The place of a tile's first element.
struct Place {
  int batch, head, query, key;
};

__device__ constexpr uint64_t bits_below(int n) {
  return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
}

// Bit i: whether key first + i of the batch exists and is no padding. All lanes must call it.
template <int n>
__device__ uint64_t visible_keys(const Attention& a, int batch, int first) {
  const AttentionMasks& masks = a.masks;
  const int lane = threadIdx.x % 32;
  uint64_t visible = 0;
#pragma unroll
  for (int part = 0; part < n; part += 32) {
    const int64_t key = first + part + lane;
    bool sees = within(key, a.keys);
    if (sees && masks.padding != nullptr) {
      sees = load(masks.padding + batch * masks.padding_batch + key * masks.padding_key) == 0;
    }
    visible |= uint64_t{__ballot_sync(0xffffffffu, sees)} << part;
  }
  return visible & bits_below(n);
}

// The first tile of n keys with a visible key, from `first` on in steps of n.
struct KeyTile {
  int first;
  uint64_t visible;
};

template <int n>
__device__ KeyTile next_keys(const Attention& a, int batch, int first, int end) {
  for (; first < end; first += n) {
    const uint64_t visible = visible_keys<n>(a, batch, first);
    if (visible != 0) {
      return {first, visible};
    }
  }
  return {first, 0};
}

// Calls visit(m, i, j) for each element of the lane.
template <int strips, int n, class Visit>
__device__ void for_each(const float (&)[strips][n][4], Visit visit) {
#pragma unroll
  for (int m = 0; m < strips; ++m) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        visit(m, i, j);
      }
    }
  }
}

// --- scale and softcap --------------------------------------------------------------------------

// tanh. For 16-bit elements the absolute error is 2^-22; that of tanh.approx would be 2^-11.
template <class T>
__device__ float tanh_of(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return tanhf(x);
  } else {
    return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(x * (2.0f * log2_e)));
  }
}

// Turns products of queries and keys into logits. With a softcap, calls slope(m, i, j, x) with the
// factor x that the softcap multiplies the gradient by.
template <class T, int strips, int n, class Slope>
__device__ void scale_logits(float (&s)[strips][n][4], const Attention& a, Slope slope) {
  if (a.softcap == 0.0f) {
    const float by = a.scale * log2_e;
    for_each(s, [&](int m, int i, int j) { s[m][i][j] *= by; });
    return;
  }
  const float by = a.scale / a.softcap, cap = a.softcap * log2_e;
  for_each(s, [&](int m, int i, int j) {
    const float x = tanh_of<T>(s[m][i][j] * by);
    s[m][i][j] = cap * x;
    slope(m, i, j, fmaf(-x, x, 1.0f));
  });
}

// --- masks --------------------------------------------------------------------------------------

template <bool keys_are_rows, class T, int strips, int n>
__device__ void add_mask(float (&s)[strips][n][4], const Attention& a, const Place& at) {
  const AttentionMasks& masks = a.masks;
  const int64_t first = at.batch * masks.batch + at.head * masks.head;
  for_each(s, [&](int m, int i, int j) {
    const int row = m * strip_rows + threadIdx.x % 32 / 4 + j / 2 * 8;
    const int column = i * 8 + threadIdx.x % 4 * 2 + j % 2;
    const int64_t query = at.query + (keys_are_rows ? column : row);
    const int64_t key = at.key + (keys_are_rows ? row : column);
    if (within(query, a.queries) && within(key, a.keys)) {
      const int64_t place = first + query * masks.query + key * masks.key;
      float& logit = s[m][i][j];
      if (masks.added != nullptr) {
        logit = fmaf(load(masks.added + place), log2_e, logit);
      } else if (sizeof(T) == 2 && masks.narrow != nullptr) {
        logit = fmaf(to_float(load(static_cast<const T*>(masks.narrow) + place)), log2_e, logit);
      } else {
        logit = load(masks.shown + place) != 0 ? logit : -INFINITY;
      }
    }
  });
}

// `visible`: one bit per key of the tile. A tile without a hidden element needs only this check.
template <bool keys_are_rows, class T, int strips, int n>
__device__ void mask_logits(
    float (&s)[strips][n][4], const Attention& a, const Place& at, uint64_t visible) {
  constexpr int keys = keys_are_rows ? strips * strip_rows : n * 8;
  if (a.masks.of_each_logit()) {
    add_mask<keys_are_rows, T>(s, a, at);
  }
  const int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
  const int first_row = group, first_column = 2 * in_group;
  // Key k is above the diagonal of query q if k - q > ahead. Both are relative to the tile's first.
  const int ahead = a.masks.is_causal ? at.query - at.key : INT32_MAX;
  if (ahead >= keys - 1 && visible == bits_below(keys)) {
    return;
  }
  const uint64_t mine = visible >> (keys_are_rows ? first_row : first_column);
  const int offset = keys_are_rows ? first_row - first_column : first_column - first_row;
  for_each(s, [&](int m, int i, int j) {
    const int row = m * strip_rows + j / 2 * 8, column = i * 8 + j % 2;
    const int key = keys_are_rows ? row : column, query = keys_are_rows ? column : row;
    const bool sees = (mine >> key & 1) != 0 && key - query + offset <= ahead;
    s[m][i][j] = sees ? s[m][i][j] : -INFINITY;
  });
}

// --- dropout ------------------------------------------------------------------------------------

// Bit 4 i + j of [m]: whether the number of the element is below the threshold. The layout of a
// draw in csrc/philox.h is that of tiles whose rows are queries.
template <int strips, int n>
__device__ void draw_for_queries(
    uint32_t (&kept)[strips], const Attention& a, const int64_t (&seed)[2], const Place& at) {
  const int64_t head = int64_t{at.batch} * a.heads + at.head;
  const int row_tile = at.query / dropout_tile, column_tile = at.key / dropout_tile;
#pragma unroll
  for (int i = 0; i < strips * n / 2; ++i) {
    const int m = i / (n / 2), pair = i % (n / 2);
    const Random128 drawn =
        dropout_draw(seed, head, row_tile + m, column_tile + pair, threadIdx.x % 32);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t number = drawn.at[j / 4 * 2 + j % 4 / 2] >> (16 * (j % 2)) & 0xffff;
      kept[m] |= uint32_t{number < a.dropout.threshold} << (8 * pair + j);
    }
  }
}

// The same for tiles whose rows are keys. The elements of a lane come from two draws. The lane
// makes one of them; its neighbour with the next or the last key makes the other one.
template <int strips, int n>
__device__ void draw_for_keys(
    uint32_t (&kept)[strips], const Attention& a, const int64_t (&seed)[2], const Place& at) {
  const int64_t head = int64_t{at.batch} * a.heads + at.head;
  const int row_tile = at.query / dropout_tile, column_tile = at.key / dropout_tile;
  const int group = threadIdx.x % 32 / 4, in_group = threadIdx.x % 4;
  const int odd = group % 2;
  const int call = 4 * (2 * in_group + odd) + group / 2;
#pragma unroll
  for (int i = 0; i < strips * n / 2; ++i) {
    const int m = i / (n / 2), pair = i % (n / 2);
    const Random128 mine = dropout_draw(seed, head, row_tile + pair, column_tile + m, call);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, mine.at[word], 4);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint32_t number = (c == odd ? mine.at[word] : other) >> (16 * odd) & 0xffff;
        const int bit = 8 * pair + word % 2 * 4 + word / 2 * 2 + c;
        kept[m] |= uint32_t{number < a.dropout.threshold} << bit;
      }
    }
  }
}

template <bool keys_are_rows, int strips, int n>
__device__ void draw_kept(uint32_t (&kept)[strips], const Attention& a, const Place& at) {
  static_assert(n <= 8);
  const int64_t seed[2] = {load(a.seed), load(a.seed + 1)};
#pragma unroll
  for (int m = 0; m < strips; ++m) {
    kept[m] = 0;
  }
  if constexpr (keys_are_rows) {
    draw_for_keys<strips, n>(kept, a, seed, at);
  } else {
    draw_for_queries<strips, n>(kept, a, seed, at);
  }
}

__device__ inline bool is_kept(uint32_t kept, int i, int j) { return kept >> (4 * i + j) & 1; }

}  // namespace fastguard
