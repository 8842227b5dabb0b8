// One call of attention as the CPU's kernels see it, and how it is cut into tasks.
#pragma once

#include <cstdint>

namespace fastguard {

constexpr int64_t panel_keys = 64;
constexpr int64_t most_columns = 256;  // of a head
constexpr int64_t row_block = 64;  // rows of the query that are worked on together

// A tensor (B, H, rows, columns); strides in elements, that of the columns is 1.
struct Heads {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

enum class MaskKind { none, shown, wide, narrow };  // bool; added, as wide as sums or as operands

struct AttentionMask {
  const void* data = nullptr;
  MaskKind kind = MaskKind::none;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// 64 keys of one utterance, of which at least one is not padded.
struct Panel {
  int64_t first;
  int64_t columns;  // up to the last that is not padded, rounded up to the kernel's key_unit
  uint64_t keep;  // a bit for each key
};

// In order.
struct PanelList {
  const Panel* first;
  int64_t count;
};

struct AttentionProblem {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  Heads query, key, value, output;
  Heads unrounded;  // the output as wide as sums are, or null; in the backward pass, for `output`
  void* logsumexp;  // (B, H, T), as wide as sums are
  void* stats;  // (2, B, H, T), or null
  AttentionMask mask;
  const PanelList* panels;  // of each utterance
  const int64_t* seed;  // null without dropout
  double dropout_p, scale, softcap, clamp;
  bool is_causal;
  // Of the backward pass only.
  Heads grad_output, grad_query, grad_key, grad_value;
  int64_t chunks;  // into which the keys are cut
  void*
      partial_grad_query;  // (chunks, B, H, T, D), as wide as sums are; null if there is one chunk
};

struct ForwardTask {
  int64_t b, h, begin, end;  // rows, from a multiple of row_block on
};

struct BackwardTask {
  int64_t b, kv_head, chunk;
};

}  // namespace fastguard
