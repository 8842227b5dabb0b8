// attention_backward. After Dao 2023 (FlashAttention-2, arXiv 2307.08691), but in two passes over
// the logits, one for the gradients of keys and values and one for those of queries: each block
// owns what it writes, so there are no atomics and the result is the same every time.
//
// Both have a tile that stays, of which each warp owns 16 rows, and tiles that pass by, two at a
// time: one in use, the next on its way. For the keys' gradients the logits are made transposed,
// keys as rows, so that weights and their gradients need not leave the registers there either.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/attention_float.cuh"

namespace fastguard {

constexpr int padded_rows = 64;  // rows of terms are a multiple of it for each head
constexpr int delta_lanes = 8;  // of a row in attention_delta_kernel

// Of a row of logits: their logsumexp, in units of log 2, and the sum of output times gradient. A
// row without a key, and one that is only padding, has inf and 0: its weights become 0.
struct alignas(8) RowTerms {
  float logsumexp, delta;
};

template <class T>
struct Backward {
  Attention attention;
  int batch;
  int terms_rows;  // of a head: its queries, rounded up to padded_rows
  Heads<const T> query, key, value, output;
  Heads<const float> unrounded;  // for `output`, or null
  Heads<const T> grad_output;
  const float* logsumexp;  // (B, H, T)
  Heads<T> passed;  // grad_output where it passes the clamp, (B, H, T, Dv)
  RowTerms* terms;  // (B, H, terms_rows)
  Heads<T> grad_query, grad_key, grad_value;

  template <class O>
  __device__ Heads<const O> saved() const {
    if constexpr (std::is_same_v<O, T>) {
      return output;
    } else {
      return unrounded;
    }
  }
  __device__ const RowTerms* terms_of(int b, int head) const {
    return terms + (int64_t{b} * attention.heads + head) * terms_rows;
  }

  int64_t delta_blocks() const {
    return int64_t{batch} * attention.heads * terms_rows / (attention_threads / delta_lanes);
  }
};

// --- what passes the clamp ----------------------------------------------------------------------

template <class T>
__device__ float element_of(uint32_t word, int i) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return bits_as<float>(word);
  } else {
    return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
  }
}

// Element i of consecutive ones.
template <class T, int n>
__device__ float element_of(const Bytes16 (&x)[n], int i) {
  constexpr int in_word = 4 / sizeof(T);
  return element_of<T>(x[i / (4 * in_word)].at[i / in_word % 4], i % in_word);
}

// What of a word's gradients passes; what they and the output, x, sum up to is added to `delta`.
template <class T>
__device__ uint32_t
pass_word(const float (&x)[4 / sizeof(T)], uint32_t grad, float bound, float& delta) {
  constexpr int bits = 8 * sizeof(T);
  uint32_t passed = 0;
#pragma unroll
  for (int i = 0; i < 32 / bits; ++i) {
    // As torch compares an element with a number: in the element's type.
    const bool passes = bound == INFINITY || fabsf(to_float(from_float<T>(x[i]))) < bound;
    delta = passes ? fmaf(x[i], element_of<T>(grad, i), delta) : delta;
    passed |= passes ? grad & (~uint32_t{0} >> (32 - bits) << (bits * i)) : 0;
  }
  return passed;
}

// One row of all for each 8 lanes. O: type of the output that was saved.
template <class T, class O>
__global__ void __launch_bounds__(attention_threads) attention_delta_kernel(Backward<T> b) {
  constexpr int n = elements_of_16_bytes<T>, in_word = 4 / sizeof(T), parts = sizeof(O) / sizeof(T);
  const Attention& a = b.attention;
  const int64_t place = (int64_t{blockIdx.x} * attention_threads + threadIdx.x) / delta_lanes;
  const int row = place % b.terms_rows, head = place / b.terms_rows % a.heads;
  const int batch = place / b.terms_rows / a.heads;
  RowTerms terms{INFINITY, 0.0f};
  if (within(row, a.queries)) {
    const int64_t of_all = (int64_t{batch} * a.heads + head) * a.queries + row;
    terms.logsumexp = load(b.logsumexp + of_all) * log2_e;
    // Nothing comes back to a row without a key.
    const bool dead = terms.logsumexp == INFINITY;
    const float bound = dead ? 0.0f : to_float(from_float<T>(a.clamp));
    const auto* output = b.template saved<O>().template row_of<const Bytes16>(batch, head, row);
    const auto* grad = b.grad_output.template row_of<const Bytes16>(batch, head, row);
    auto* passed = b.passed.template row_of<Bytes16>(batch, head, row);
#pragma unroll 1
    for (int i = threadIdx.x % delta_lanes; within(i * n, a.value_dim); i += delta_lanes) {
      Bytes16 o[parts];
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        o[part] = load(output + i * parts + part);
      }
      Bytes16 d = load(grad + i);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float x[in_word];
#pragma unroll
        for (int j = 0; j < in_word; ++j) {
          x[j] = element_of<O>(o, word * in_word + j);
        }
        d.at[word] = pass_word<T>(x, d.at[word], bound, terms.delta);
      }
      store(passed + i, d);
    }
  }
#pragma unroll
  for (int distance = 1; distance < delta_lanes; distance *= 2) {
    terms.delta += __shfl_xor_sync(0xffffffffu, terms.delta, distance);
  }
  if (threadIdx.x % delta_lanes == 0) {
    store(b.terms + place, terms);
  }
}

// --- weights and the gradients of logits --------------------------------------------------------

template <class T, int D>
struct BackwardTiles {
  using Tile = RowTile<T, D>;
  static constexpr int rows = attention_warps * strip_rows;
  // As many rows pass by at a time as the registers and 99 KiB of shared memory have room for.
  static constexpr int passing = Tile::row_bytes <= 128 ? 64 : Tile::row_bytes <= 256 ? 32 : 16;

  static constexpr int staying_bytes = rows * Tile::row_bytes;
  static constexpr int passing_bytes = passing * Tile::row_bytes;
  static constexpr int terms_bytes = passing * static_cast<int>(sizeof(RowTerms));
  static constexpr int stage_bytes = 2 * passing_bytes + terms_bytes;
  static constexpr int bytes = 2 * staying_bytes + 2 * stage_bytes;

  static int64_t query_blocks(const Backward<T>& b) {
    return int64_t{b.batch} * b.attention.heads * ((b.attention.queries + rows - 1) / rows);
  }
  static int64_t key_blocks(const Backward<T>& b) {
    return int64_t{b.batch} * b.attention.kv_heads * ((b.attention.keys + rows - 1) / rows);
  }

  // Keys and values, or queries and gradients.
  static __device__ Tile staying(int which) { return {which * staying_bytes}; }
  static __device__ Tile passing_tile(int stage, int which) {
    return {2 * staying_bytes + stage * stage_bytes + which * passing_bytes};
  }
  static __device__ Shared<RowTerms> terms(int stage) {
    return dynamic_shared<RowTerms>(2 * staying_bytes + stage * stage_bytes + 2 * passing_bytes);
  }
};

// Products s of queries and keys, and dp of gradients and values, become the weights as the values
// met them, but for dropout's factor, and the gradients of the products, but for the scale.
// terms(i, j): those of the element's query.
template <bool keys_are_rows, class T, int n, class Terms>
__device__ void weigh(
    float (&s)[1][n][4],
    float (&dp)[1][n][4],
    const Attention& a,
    const Place& at,
    uint64_t visible,
    Terms terms) {
  uint32_t kept[1] = {~0u};
  if (a.seed != nullptr) {
    draw_kept<keys_are_rows, 1, n>(kept, a, at);
    for_each(dp, [&](int, int i, int j) {
      dp[0][i][j] = is_kept(kept[0], i, j) ? dp[0][i][j] * a.dropout.rescale : 0.0f;
    });
  }
  for_each(dp, [&](int, int i, int j) { dp[0][i][j] -= terms(i, j).delta; });
  scale_logits<T>(s, a, [&](int, int i, int j, float slope) { dp[0][i][j] *= slope; });
  mask_logits<keys_are_rows, T>(s, a, at, visible);
  for_each(s, [&](int, int i, int j) {
    float& x = s[0][i][j];
    const float weight = exp2_approx(x - terms(i, j).logsumexp);
    // What a row does not see gets no gradient, whatever comes back for it.
    dp[0][i][j] = x == -INFINITY ? 0.0f : weight * dp[0][i][j];
    x = is_kept(kept[0], i, j) ? weight : 0.0f;
  });
}

template <int columns>
__device__ void multiply_by(float (&d)[1][columns][4], float by) {
  for_each(d, [&](int, int i, int j) { d[0][i][j] *= by; });
}

// --- gradients of queries -----------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(attention_threads) attention_grad_query_kernel(Backward<T> b) {
  using Tiles = BackwardTiles<T, D>;
  constexpr int rows = Tiles::rows, keys = Tiles::passing;
  const Attention& a = b.attention;
  const int tiles = (a.queries + rows - 1) / rows;
  const int top = (tiles - 1 - static_cast<int>(blockIdx.x % tiles)) * rows;
  const int head = blockIdx.x / tiles % a.heads, batch = blockIdx.x / tiles / a.heads;
  const int row = threadIdx.x / 32 * strip_rows;
  const auto query = Tiles::staying(0), grad = Tiles::staying(1);
  const T* keys_from = b.key.of(batch, a.kv_head(head));
  const T* values_from = b.value.of(batch, a.kv_head(head));
  const auto copy = [&](int stage, KeyTile tile) {
    const auto sees = [&](int i) { return (tile.visible >> i & 1) != 0; };
    copy_rows<keys>(
        Tiles::passing_tile(stage, 0),
        keys_from + tile.first * b.key.row,
        b.key.row,
        a.head_dim,
        sees);
    copy_rows<keys>(
        Tiles::passing_tile(stage, 1),
        values_from + tile.first * b.value.row,
        b.value.row,
        a.value_dim,
        sees);
  };

  RowTerms terms[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    terms[half] = load(b.terms_of(batch, head) + top + row + half * 8 + threadIdx.x % 32 / 4);
  }
  float d[1][D / 8][4] = {};
  const int end = a.keys_end(top, rows);
  KeyTile tile = next_keys<keys>(a, batch, 0, end);
  if (tile.first < end) {
    const auto exists = [&](int i) { return within(top + i, a.queries); };
    copy_rows<rows>(
        query, b.query.of(batch, head) + top * b.query.row, b.query.row, a.head_dim, exists);
    copy_rows<rows>(
        grad, b.passed.of(batch, head) + top * b.passed.row, b.passed.row, a.value_dim, exists);
    copy(0, tile);
  }
  commit_async();
  for (int stage = 0; tile.first < end; stage ^= 1) {
    const KeyTile next = next_keys<keys>(a, batch, tile.first + keys, end);
    wait_async<0>();
    __syncthreads();  // this stage is there, and nobody needs the other any more
    if (next.first < end) {
      copy(stage ^ 1, next);
    }
    commit_async();
    float s[1][keys / 8][4] = {}, dp[1][keys / 8][4] = {};
    multiply_rows(s, query, row, Tiles::passing_tile(stage, 0));
    multiply_rows(dp, grad, row, Tiles::passing_tile(stage, 1));
    weigh<false, T>(s, dp, a, {batch, head, top + row, tile.first}, tile.visible, [&](int, int j) {
      return terms[j / 2];
    });
    multiply_columns(d, dp, Tiles::passing_tile(stage, 0));
    tile = next;
  }
  multiply_by(d, a.scale);
  store_rows(
      d,
      query,
      row,
      b.grad_query.of(batch, head) + top * b.grad_query.row,
      b.grad_query.row,
      a.queries - top,
      a.head_dim);
}

// --- gradients of keys and values ---------------------------------------------------------------

// The queries that a tile of keys meets: those of one head after another.
template <class T, int D>
struct QueryTiles {
  static constexpr int rows = BackwardTiles<T, D>::passing;

  __device__ QueryTiles(const Attention& a, int kv_head, int first_key)
      : group(a.heads / a.kv_heads),
        first_head(kv_head * group),
        first(a.masks.is_causal ? first_key / rows * rows : 0),
        a_head(first < a.queries ? (a.queries - first + rows - 1) / rows : 0) {}

  __device__ int count() const { return group * a_head; }
  __device__ int head(int i) const { return first_head + i / a_head; }
  __device__ int query(int i) const { return first + i % a_head * rows; }

  int group, first_head, first, a_head;
};

template <class T, int D>
__device__ void copy_queries(const Backward<T>& b, int stage, int batch, int head, int top) {
  using Tiles = BackwardTiles<T, D>;
  constexpr int rows = Tiles::passing;
  const auto exists = [&](int i) { return within(top + i, b.attention.queries); };
  copy_rows<rows>(
      Tiles::passing_tile(stage, 0),
      b.query.of(batch, head) + top * b.query.row,
      b.query.row,
      b.attention.head_dim,
      exists);
  copy_rows<rows>(
      Tiles::passing_tile(stage, 1),
      b.passed.of(batch, head) + top * b.passed.row,
      b.passed.row,
      b.attention.value_dim,
      exists);
  const int pair = 2 * threadIdx.x;
  if (pair < rows) {
    const RowTerms* from = b.terms_of(batch, head) + top + pair;
    copy_async16(Tiles::terms(stage) + pair, from, true);
  }
}

// Stores the warp's rows; those of hidden keys as zeros, even if NaN came back to all of a tile.
template <class T, int D>
__device__ void store_visible(
    float (&d)[1][D / 8][4],
    RowTile<T, D> tile,
    int row,
    uint64_t visible,
    T* to,
    int64_t stride,
    int64_t count,
    int width) {
  const uint64_t mine = visible >> (row + threadIdx.x % 32 / 4);
  for_each(d, [&](int, int i, int j) {
    d[0][i][j] = (mine >> (j / 2 * 8) & 1) != 0 ? d[0][i][j] : 0.0f;
  });
  store_rows(d, tile, row, to, stride, count, width);
}

template <class T, int D>
__global__ void __launch_bounds__(attention_threads) attention_grad_key_kernel(Backward<T> b) {
  using Tiles = BackwardTiles<T, D>;
  constexpr int rows = Tiles::rows, queries = Tiles::passing;
  const Attention& a = b.attention;
  const int tiles = (a.keys + rows - 1) / rows;
  const int first = static_cast<int>(blockIdx.x % tiles) * rows;
  const int kv_head = blockIdx.x / tiles % a.kv_heads, batch = blockIdx.x / tiles / a.kv_heads;
  const int row = threadIdx.x / 32 * strip_rows, in_group = threadIdx.x % 4;
  const auto key = Tiles::staying(0), value = Tiles::staying(1);
  const uint64_t visible = visible_keys<rows>(a, batch, first);
  const QueryTiles<T, D> passing(a, kv_head, first);
  const int count = visible != 0 ? passing.count() : 0;

  float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
  if (count > 0) {
    const auto sees = [&](int i) { return (visible >> i & 1) != 0; };
    copy_rows<rows>(key, b.key.of(batch, kv_head) + first * b.key.row, b.key.row, a.head_dim, sees);
    copy_rows<rows>(
        value, b.value.of(batch, kv_head) + first * b.value.row, b.value.row, a.value_dim, sees);
    copy_queries<T, D>(b, 0, batch, passing.head(0), passing.query(0));
  }
  commit_async();
  for (int i = 0; i < count; ++i) {
    const int stage = i % 2;
    wait_async<0>();
    __syncthreads();  // this stage is there, and nobody needs the other any more
    if (i + 1 < count) {
      copy_queries<T, D>(b, stage ^ 1, batch, passing.head(i + 1), passing.query(i + 1));
    }
    commit_async();
    const auto query = Tiles::passing_tile(stage, 0), grad = Tiles::passing_tile(stage, 1);
    const Shared<RowTerms> terms = Tiles::terms(stage);
    float s[1][queries / 8][4] = {}, dp[1][queries / 8][4] = {};
    multiply_rows(s, key, row, query);
    multiply_rows(dp, value, row, grad);
    weigh<true, T>(
        s,
        dp,
        a,
        {batch, passing.head(i), passing.query(i), first + row},
        visible >> row & bits_below(strip_rows),
        [&](int i, int j) -> RowTerms { return terms[i * 8 + 2 * in_group + j % 2]; });
    multiply_columns(dv, s, grad);
    multiply_columns(dk, dp, query);
  }
  multiply_by(dk, a.scale);
  multiply_by(dv, a.dropout.rescale);
  store_visible(
      dk,
      key,
      row,
      visible,
      b.grad_key.of(batch, kv_head) + first * b.grad_key.row,
      b.grad_key.row,
      a.keys - first,
      a.head_dim);
  store_visible(
      dv,
      value,
      row,
      visible,
      b.grad_value.of(batch, kv_head) + first * b.grad_value.row,
      b.grad_value.row,
      a.keys - first,
      a.value_dim);
}

}  // namespace fastguard
