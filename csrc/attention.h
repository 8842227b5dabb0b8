// What attention's kernels for CPU and CUDA are given, and the checks that they share. Masks'
// conventions: csrc/ops.cpp.
#pragma once

#include "checks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

namespace fastguard {

constexpr int64_t most_head_dim = 256;
// Dropout and CUDA's kernels count rows, keys and heads in 32 bits, up to a tile beyond.
constexpr int64_t most_rows = INT32_MAX - 1024;

struct AttentionSizes {
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
};

struct AttentionOptions {
  bool is_causal;
  double dropout_p;
  double scale;
  double softcap;  // 0: none
  double clamp;  // inf: none
};

// The shim's number of the dtype that sums of the query's products have.
inline int32_t sums_of(const torch::stable::Tensor& query) {
  const bool wide = query.scalar_type() == torch::headeronly::ScalarType::Double;
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline AttentionSizes check_attention_shapes(
    const char* op,
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value) {
  STD_TORCH_CHECK(
      query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
      op,
      ": query, key and value must have 4 dimensions, (B, H, T, D); got ",
      query.dim(),
      ", ",
      key.dim(),
      " and ",
      value.dim());
  const AttentionSizes sizes{
      query.size(0),
      query.size(1),
      key.size(1),
      query.size(2),
      key.size(2),
      query.size(3),
      value.size(3)};
  STD_TORCH_CHECK(
      key.size(0) == sizes.batch && value.size(0) == sizes.batch &&
          value.size(1) == sizes.kv_heads && value.size(2) == sizes.keys &&
          key.size(3) == sizes.head_dim && sizes.kv_heads > 0 && sizes.heads > 0 &&
          sizes.heads % sizes.kv_heads == 0,
      op,
      ": query (B, H, T, D), key (B, G, S, D) and value (B, G, S, Dv) do not fit, or H is no "
      "multiple of G");
  STD_TORCH_CHECK(
      sizes.queries > 0 && sizes.keys > 0 && sizes.head_dim > 0 && sizes.value_dim > 0 &&
          sizes.head_dim <= most_head_dim && sizes.value_dim <= most_head_dim,
      op,
      ": T and S must be at least 1, head dims 1 to ",
      most_head_dim,
      "; got T=",
      sizes.queries,
      ", S=",
      sizes.keys,
      ", D=",
      sizes.head_dim,
      ", Dv=",
      sizes.value_dim);
  STD_TORCH_CHECK(
      sizes.batch <= most_rows && sizes.heads <= most_rows && sizes.queries <= most_rows &&
          sizes.keys <= most_rows,
      op,
      ": B, H, T and S must be at most ",
      most_rows,
      "; got ",
      sizes.batch,
      ", ",
      sizes.heads,
      ", ",
      sizes.queries,
      ", ",
      sizes.keys);
  return sizes;
}

inline void check_attention_masks(
    const char* op,
    const AttentionSizes& sizes,
    torch::headeronly::ScalarType dtype,
    const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& attn_mask) {
  using torch::headeronly::ScalarType;
  const ScalarType added = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      !key_padding_mask.has_value() ||
          (key_padding_mask->scalar_type() == ScalarType::Bool && key_padding_mask->dim() == 2 &&
           key_padding_mask->size(0) == sizes.batch && key_padding_mask->size(1) == sizes.keys),
      op,
      ": key_padding_mask must be bool of shape (",
      sizes.batch,
      ", ",
      sizes.keys,
      ")");
  STD_TORCH_CHECK(
      !attn_mask.has_value() ||
          ((attn_mask->scalar_type() == ScalarType::Bool || attn_mask->scalar_type() == added ||
            attn_mask->scalar_type() == dtype) &&
           attn_mask->dim() == 4 && attn_mask->size(0) == sizes.batch &&
           attn_mask->size(1) == sizes.heads && attn_mask->size(2) == sizes.queries &&
           attn_mask->size(3) == sizes.keys),
      op,
      ": attn_mask must be bool or of dtype number ",
      static_cast<int>(dtype),
      " or ",
      static_cast<int>(added),
      " and of shape (",
      sizes.batch,
      ", ",
      sizes.heads,
      ", ",
      sizes.queries,
      ", ",
      sizes.keys,
      ")");
  if (key_padding_mask.has_value()) {
    check_memory(key_padding_mask->get(), op, [] { return "key_padding_mask"; });
  }
  if (attn_mask.has_value()) {
    check_memory(attn_mask->get(), op, [] { return "attn_mask"; });
  }
}

// The kernels compute in float32. A softcap outside of this range would be 0 or inf there, a larger
// scale inf, and the output NaN. Twins: fastguard/ops/attention.py.
constexpr double smallest_softcap = 1e-30;
constexpr double largest_softcap = 1e30;
constexpr double largest_scale = 1e30;

inline void check_attention_options(
    const char* op,
    const AttentionOptions& options,
    const std::optional<torch::stable::Tensor>& seed) {
  STD_TORCH_CHECK(
      options.dropout_p >= 0.0 && options.dropout_p < 1.0 &&
          (options.softcap == 0.0 ||
           (options.softcap >= smallest_softcap && options.softcap <= largest_softcap)) &&
          options.clamp > 0.0,
      op,
      ": dropout_p must be in [0, 1), softcap 0 or in [1e-30, 1e30], clamp above 0; got ",
      options.dropout_p,
      ", ",
      options.softcap,
      ", ",
      options.clamp);
  STD_TORCH_CHECK(
      std::abs(options.scale) <= largest_scale,
      op,
      ": scale must be between -1e30 and 1e30; got ",
      options.scale);
  STD_TORCH_CHECK(
      options.dropout_p == 0.0 || seed.has_value(), op, ": dropout needs a seed of two int64");
  if (seed.has_value()) {
    check_tensor(*seed, op, "seed", torch::headeronly::ScalarType::Long, 1);
    STD_TORCH_CHECK(seed->numel() == 2, op, ": seed must be 2 numbers, got ", seed->numel());
  }
}

inline AttentionSizes check_attention(
    const char* op,
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& key,
    const torch::stable::Tensor& value,
    const std::optional<torch::stable::Tensor>& key_padding_mask,
    const std::optional<torch::stable::Tensor>& attn_mask,
    const std::optional<torch::stable::Tensor>& seed,
    const AttentionOptions& options) {
  const AttentionSizes sizes = check_attention_shapes(op, query, key, value);
  check_dtype(query, op, 0);
  STD_TORCH_CHECK(
      key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
      op,
      ": query, key and value differ in dtype");
  check_memory(query.get(), op, [] { return "query"; });
  check_memory(key.get(), op, [] { return "key"; });
  check_memory(value.get(), op, [] { return "value"; });
  check_attention_masks(op, sizes, query.scalar_type(), key_padding_mask, attn_mask);
  check_attention_options(op, options, seed);
  return sizes;
}

// Of what the forward pass gave back; `output` may be what it was before it was rounded.
inline void check_attention_saved(
    const AttentionSizes& sizes,
    const torch::stable::Tensor& query,
    const torch::stable::Tensor& grad_output,
    const torch::stable::Tensor& output,
    const torch::stable::Tensor& logsumexp) {
  using torch::headeronly::ScalarType;
  const ScalarType wide =
      query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fits = [&](const torch::stable::Tensor& tensor) {
    return tensor.dim() == 4 && tensor.size(0) == sizes.batch && tensor.size(1) == sizes.heads &&
        tensor.size(2) == sizes.queries && tensor.size(3) == sizes.value_dim;
  };
  STD_TORCH_CHECK(
      fits(grad_output) && grad_output.scalar_type() == query.scalar_type() && fits(output) &&
          (output.scalar_type() == query.scalar_type() || output.scalar_type() == wide),
      "attention_backward: grad_output and output must be (B, H, T, Dv) of query's dtype; output "
      "may be of logsumexp's");
  check_memory(grad_output.get(), "attention_backward", [] { return "grad_output"; });
  check_memory(output.get(), "attention_backward", [] { return "output"; });
  check_tensor(logsumexp, "attention_backward", "logsumexp", wide, 3);
  STD_TORCH_CHECK(
      logsumexp.size(0) == sizes.batch && logsumexp.size(1) == sizes.heads &&
          logsumexp.size(2) == sizes.queries,
      "attention_backward: logsumexp must be (B, H, T)");
}

// (B, H, rows, columns) whose memory is that of (B, rows, H, columns): the heads of an output lie
// side by side, and the heads of an input are cut apart, without a copy. It is no view: autograd
// refuses that a view is changed in place which an operator gave back. `wide`: of sums_of.
inline torch::stable::Tensor empty_heads(
    const torch::stable::Tensor& like,
    int64_t batch,
    int64_t heads,
    int64_t rows,
    int64_t columns,
    bool wide = false) {
  int32_t dtype = sums_of(like);
  if (!wide) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  return empty_strided(
      like,
      {batch, heads, rows, columns},
      {rows * heads * columns, columns, heads * columns, 1},
      dtype);
}

}  // namespace fastguard
