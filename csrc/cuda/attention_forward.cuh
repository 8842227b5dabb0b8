// attention. Tiles and online softmax after Dao 2023 (FlashAttention-2, arXiv 2307.08691).
//
// A block makes the output of some rows of one head. Tiles of keys and values pass by, those
// without a visible key left out; values are on their way while the logits are made, the next keys
// while the values are added up.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/attention_float.cuh"

namespace fastguard {

template <class T, int D>
struct ForwardTiles {
  // Two strips share what a warp reads of keys and values, which is what bounds the tensor cores of
  // sm_80 and sm_90; for wider heads the registers do not last.
  static constexpr int strips = sizeof(T) == 2 && D <= 64 ? 2 : 1;
  static constexpr int rows = attention_warps * strip_rows * strips;
  static constexpr int keys = sizeof(T) == 2 && strips == 1 ? 64 : 32;
  static constexpr int query = 0;
  static constexpr int key = query + rows * RowTile<T, D>::row_bytes;
  static constexpr int value = key + keys * RowTile<T, D>::row_bytes;
  static constexpr int bytes = value + keys * RowTile<T, D>::row_bytes;

  static int64_t blocks(const Attention& a, int64_t batch) {
    return batch * a.heads * ((a.queries + rows - 1) / rows);
  }
};

template <class T>
struct Forward {
  Attention attention;
  Heads<const T> query, key, value;
  Heads<T> output;
  Heads<float> unrounded;  // or null
  float* logsumexp;  // (B, H, T)
  float* stats;  // (2, B, H, T) or null
  int64_t rows;  // B H T
};

__device__ inline float quad_max(float x) {
  x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Of a lane's rows, g and g + 8 of each strip, over the keys so far. Sums are of the lane's keys.
template <int strips>
struct Softmax {
  float largest[strips][2];  // logit
  float sum[strips][2];  // of exp2(logit - largest)
  float moment[strips][2];  // of exp2(logit - largest) (logit - largest), for the entropy

  __device__ Softmax() {
    for (int i = 0; i < strips * 2; ++i) {
      largest[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = moment[i / 2][i % 2] = 0.0f;
    }
  }

  // Turns logits into weights, of which the largest so far is 1, and gives `o` the same scale.
  template <int n, int columns>
  __device__ void add(float (&s)[strips][n][4], float (&o)[strips][columns][4], bool with_moment) {
#pragma unroll
    for (int i = 0; i < strips * 2; ++i) {
      const int m = i / 2, half = i % 2;
      float most = largest[m][half];
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) {
        most = max_nan(most, s[m][j / 2][2 * half + j % 2]);
      }
      most = quad_max(most);
      const float base = most == -INFINITY ? 0.0f : most;  // -inf - -inf would be NaN
      const float shrink = exp2_approx(largest[m][half] - base);
      if (with_moment) {
        add_moment(s[m], m, half, base, shrink);
      }
      largest[m][half] = most;
      sum[m][half] *= shrink;
#pragma unroll
      for (int j = 0; j < 2 * n; ++j) {
        float& x = s[m][j / 2][2 * half + j % 2];
        x = exp2_approx(x - base);
        sum[m][half] += x;
      }
#pragma unroll
      for (int j = 0; j < 2 * columns; ++j) {
        o[m][j / 2][2 * half + j % 2] *= shrink;
      }
    }
  }

 private:
  // Before `largest` and `sum` move on.
  template <int n>
  __device__ void add_moment(const float (&s)[n][4], int m, int half, float base, float shrink) {
    const float moved = sum[m][half] == 0.0f ? 0.0f : (largest[m][half] - base) * sum[m][half];
    float all = shrink * (moment[m][half] + moved);
#pragma unroll
    for (int j = 0; j < 2 * n; ++j) {
      const float x = s[j / 2][2 * half + j % 2] - base;
      all = x == -INFINITY ? all : fmaf(exp2_approx(x), x, all);
    }
    moment[m][half] = all;
  }
};

template <int strips, int n>
__device__ void drop(float (&p)[strips][n][4], const Attention& a, const Place& at) {
  uint32_t kept[strips];
  draw_kept<false, strips, n>(kept, a, at);
  for_each(
      p, [&](int m, int i, int j) { p[m][i][j] = is_kept(kept[m], i, j) ? p[m][i][j] : 0.0f; });
}

// Sums become the output, and what is known of the rows is stored. `at`: the warp's first.
template <class T, int strips, int columns>
__device__ void finish(
    const Forward<T>& f,
    Softmax<strips>& softmax,
    float (&o)[strips][columns][4],
    const Place& at) {
  const Attention& a = f.attention;
#pragma unroll
  for (int i = 0; i < strips * 2; ++i) {
    const int m = i / 2, half = i % 2;
    const float largest = softmax.largest[m][half], sum = quad_sum(softmax.sum[m][half]);
    const bool dead = largest == -INFINITY;
    const float by = a.dropout.rescale / sum;
#pragma unroll
    for (int j = 0; j < 2 * columns; ++j) {
      float& x = o[m][j / 2][2 * half + j % 2];
      x = dead ? 0.0f : min_nan(max_nan(x * by, -a.clamp), a.clamp);
    }
    const float moment = quad_sum(softmax.moment[m][half]);
    const int64_t query = at.query + m * strip_rows + half * 8 + threadIdx.x % 32 / 4;
    if (threadIdx.x % 4 == 0 && within(query, a.queries)) {
      const int64_t row = (int64_t{at.batch} * a.heads + at.head) * a.queries + query;
      store(f.logsumexp + row, dead ? INFINITY : fmaf(largest, log_2, logf(sum)));
      if (f.stats != nullptr) {
        store(f.stats + row, largest * log_2);
        const float entropy = logf(sum) - log_2 * (moment / sum);
        store(f.stats + f.rows + row, dead ? 0.0f : entropy);
      }
    }
  }
}

// What becomes the output, before it is rounded: four lanes write 32 bytes that lie side by side.
template <class T, int strips, int columns>
__device__ void store_unrounded(
    const Forward<T>& f, const float (&o)[strips][columns][4], const Place& at) {
  const int lane = threadIdx.x % 32;
  float* const to = f.unrounded.of(at.batch, at.head);
#pragma unroll
  for (int i = 0; i < strips * columns * 2; ++i) {
    const int m = i / (2 * columns), column = i / 2 % columns, half = i % 2;
    const int64_t query = at.query + m * strip_rows + half * 8 + lane / 4;
    const int first = column * 8 + lane % 4 * 2;
    if (within(query, f.attention.queries) && within(first, f.attention.value_dim)) {
      store(
          reinterpret_cast<Vector<float, 2>*>(to + query * f.unrounded.row + first),
          Vector<float, 2>{o[m][column][2 * half], o[m][column][2 * half + 1]});
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(attention_threads, D <= 64 ? 3 : 2)
    attention_kernel(Forward<T> f) {
  using Tiles = ForwardTiles<T, D>;
  constexpr int rows = Tiles::rows, keys = Tiles::keys, strips = Tiles::strips;
  const Attention& a = f.attention;
  const RowTile<T, D> query{Tiles::query}, key{Tiles::key}, value{Tiles::value};

  // The last rows first: of causal attention they are the longest work.
  const int tiles = (a.queries + rows - 1) / rows;
  const int top = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * rows;
  const int head = blockIdx.x / tiles % a.heads, batch = blockIdx.x / tiles / a.heads;
  const int row = threadIdx.x / 32 * strip_rows * strips;
  const T* keys_from = f.key.of(batch, a.kv_head(head));
  const T* values_from = f.value.of(batch, a.kv_head(head));
  const auto copy = [&](RowTile<T, D> to, const T* from, int64_t stride, int width, KeyTile tile) {
    copy_rows<keys>(to, from + tile.first * stride, stride, width, [&](int i) {
      return (tile.visible >> i & 1) != 0;
    });
  };

  float o[strips][D / 8][4] = {};
  Softmax<strips> softmax;
  const int end = a.keys_end(top, rows);
  KeyTile tile = next_keys<keys>(a, batch, 0, end);
  if (tile.first < end) {
    copy_rows<rows>(
        query, f.query.of(batch, head) + top * f.query.row, f.query.row, a.head_dim, [&](int i) {
          return within(top + i, a.queries);
        });
    copy(key, keys_from, f.key.row, a.head_dim, tile);
  }
  commit_async();
  while (tile.first < end) {
    wait_async<0>();
    __syncthreads();  // the keys are there, and nobody needs the last values any more
    copy(value, values_from, f.value.row, a.value_dim, tile);
    commit_async();

    float s[strips][keys / 8][4] = {};
    multiply_rows(s, query, row, key);
    const Place at{batch, head, top + row, tile.first};
    scale_logits<T>(s, a, [](int, int, int, float) {});
    mask_logits<false, T>(s, a, at, tile.visible);
    softmax.add(s, o, f.stats != nullptr);
    if (a.seed != nullptr) {
      drop(s, a, at);
    }

    const KeyTile next = next_keys<keys>(a, batch, tile.first + keys, end);
    wait_async<0>();
    __syncthreads();  // the values are there, and nobody needs these keys any more
    if (next.first < end) {
      copy(key, keys_from, f.key.row, a.head_dim, next);
    }
    commit_async();
    multiply_columns(o, s, value);
    tile = next;
  }
  const Place at{batch, head, top + row, 0};
  finish(f, softmax, o, at);
  if (f.unrounded.first != nullptr) {
    store_unrounded(f, o, at);
  }
  store_rows(
      o,
      query,
      row,
      f.output.of(batch, head) + top * f.output.row,
      f.output.row,
      a.queries - top,
      a.value_dim);
}

}  // namespace fastguard
