// attention and attention_backward on CUDA, of bfloat16, float16 and float32 up to 128 columns: the
// rest is for fastguard/ops/attention.py to send elsewhere.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"

#include "attention.h"
#include "cuda/launch.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- tensors as the kernels take them -----------------------------------------------------------

int64_t unit_of(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 8; }

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Whether columns lie side by side and every row begins at a multiple of 16 bytes and ends at one.
bool has_whole_rows(const Tensor& x) {
  const int64_t unit = unit_of(x);
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  bool whole = x.stride(3) == 1 && x.size(3) % unit == 0 && address % 16 == 0;
  for (int dim = 0; dim < 3; ++dim) {
    whole = whole && (x.size(dim) <= 1 || x.stride(dim) % unit == 0);
  }
  return whole;
}

// The tensor, or a copy with columns of zeros up to the next multiple of `unit`.
Tensor with_whole_rows(const Tensor& x, int64_t unit) {
  if (has_whole_rows(x) && x.size(3) % unit == 0) {
    return x;
  }
  Tensor wide =
      torch::stable::new_zeros(x, {x.size(0), x.size(1), x.size(2), round_up(x.size(3), unit)});
  Tensor columns = torch::stable::narrow(wide, 3, 0, x.size(3));
  torch::stable::copy_(columns, x);
  return wide;
}

// The tensor, or a copy with columns of zeros up to the next multiple of 16 bytes.
Tensor with_whole_rows(const Tensor& x) { return with_whole_rows(x, unit_of(x)); }

// What a kernel writes with whole rows.
Tensor empty_whole_rows(
    const Tensor& like, int64_t heads, int64_t rows, int64_t columns, bool wide = false) {
  return empty_heads(like, like.size(0), heads, rows, round_up(columns, unit_of(like)), wide);
}

// Of that, the columns that there are; nothing of what has no rows.
Tensor columns_of(Tensor wide, int64_t columns) {
  if (wide.dim() < 4 || wide.size(3) == columns) {
    return wide;
  }
  Tensor result = empty_heads(wide, wide.size(0), wide.size(1), wide.size(2), columns);
  torch::stable::copy_(result, torch::stable::narrow(wide, 3, 0, columns));
  return result;
}

template <class T>
Heads<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
Heads<T> written(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// --- arguments ----------------------------------------------------------------------------------

struct Masks {
  const std::optional<Tensor>& padding;
  const std::optional<Tensor>& attn_mask;
  const std::optional<Tensor>& seed;
};

AttentionMasks masks_of(const Masks& given, bool is_causal) {
  AttentionMasks masks{};
  masks.is_causal = is_causal;
  if (given.padding.has_value()) {
    masks.padding = static_cast<const uint8_t*>(given.padding->const_data_ptr());
    masks.padding_batch = given.padding->stride(0);
    masks.padding_key = given.padding->stride(1);
  }
  if (given.attn_mask.has_value()) {
    const Tensor& mask = *given.attn_mask;
    const void* data = mask.const_data_ptr();
    switch (mask.scalar_type()) {
      case ScalarType::Bool:
        masks.shown = static_cast<const uint8_t*>(data);
        break;
      case ScalarType::Float:
        masks.added = static_cast<const float*>(data);
        break;
      default:  // the query's, as check_attention found
        masks.narrow = data;
    }
    masks.batch = mask.stride(0);
    masks.head = mask.stride(1);
    masks.query = mask.stride(2);
    masks.key = mask.stride(3);
  }
  return masks;
}

// Checks what CUDA's kernels ask beyond check_attention. `query` and `value` have whole rows.
Attention attention_of(
    const AttentionSizes& sizes,
    const AttentionOptions& options,
    const Tensor& query,
    const Tensor& value,
    const Masks& masks) {
  STD_TORCH_CHECK(
      query.scalar_type() != ScalarType::Double && query.size(3) <= most_kernel_width &&
          value.size(3) <= most_kernel_width,
      "attention: CUDA's kernels take float32, bfloat16 and float16 and head dims up to ",
      most_kernel_width,
      "; fastguard.ops.attention.attention takes the others");
  const bool drops = options.dropout_p > 0.0;
  return {
      static_cast<int>(sizes.heads),
      static_cast<int>(sizes.kv_heads),
      static_cast<int>(sizes.queries),
      static_cast<int>(sizes.keys),
      static_cast<int>(query.size(3)),
      static_cast<int>(value.size(3)),
      static_cast<float>(options.scale),
      static_cast<float>(options.softcap),
      static_cast<float>(options.clamp),
      dropout_of(options.dropout_p),
      drops ? masks.seed->const_data_ptr<int64_t>() : nullptr,
      masks_of(masks, options.is_causal)};
}

void check_all_on(
    const Stream& on, const char* op, const Tensor& key, const Tensor& value, const Masks& masks) {
  check_on(on, key, op, "key");
  check_on(on, value, op, "value");
  check_on(on, masks.padding, op, "key_padding_mask");
  check_on(on, masks.attn_mask, op, "attn_mask");
  check_on(on, masks.seed, op, "seed");
}

template <class Call>
void with_type(const Tensor& x, Call call) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return call(BFloat16{});
    case ScalarType::Half:
      return call(Float16{});
    default:
      return call(float{});
  }
}

template <class Arguments>
void launch_blocks(
    const Stream& on,
    void (*kernel)(Arguments),
    int64_t blocks,
    int shared,
    const Arguments& arguments) {
  STD_TORCH_CHECK(
      blocks <= INT32_MAX, "attention: ", blocks, " tiles are more than one launch can have");
  if (blocks > 0) {
    launch(on, kernel, {static_cast<int>(blocks), shared, false, attention_threads}, arguments);
  }
}

// --- operators ----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_cuda(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& key_padding_mask,
    const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seed,
    bool is_causal,
    double dropout_p,
    double scale,
    double softcap,
    double clamp,
    bool return_stats,
    bool return_unrounded) {
  const AttentionOptions options{is_causal, dropout_p, scale, softcap, clamp};
  const AttentionSizes sizes =
      check_attention("attention", query, key, value, key_padding_mask, attn_mask, seed, options);
  const Masks masks{key_padding_mask, attn_mask, seed};
  const Stream on(query);
  check_all_on(on, "attention", key, value, masks);
  const Tensor q = with_whole_rows(query), k = with_whole_rows(key), v = with_whole_rows(value);
  const Attention attention = attention_of(sizes, options, q, v, masks);

  const std::vector<int64_t> rows{sizes.batch, sizes.heads, sizes.queries};
  const Tensor output = empty_whole_rows(query, sizes.heads, sizes.queries, sizes.value_dim);
  const Tensor logsumexp = on.empty(rows, ScalarType::Float);
  const Tensor stats = on.empty(
      return_stats ? std::vector<int64_t>{2, rows[0], rows[1], rows[2]} : std::vector<int64_t>{0},
      ScalarType::Float);
  const Tensor unrounded = return_unrounded
      ? empty_whole_rows(query, sizes.heads, sizes.queries, sizes.value_dim, true)
      : on.empty({0}, ScalarType::Float);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    const Forward<T> forward{
        attention,
        read<T>(q),
        read<T>(k),
        read<T>(v),
        written<T>(output),
        return_unrounded ? written<float>(unrounded) : Heads<float>{},
        logsumexp.mutable_data_ptr<float>(),
        return_stats ? stats.mutable_data_ptr<float>() : nullptr,
        logsumexp.numel()};
    with_width<T>(std::max(attention.head_dim, attention.value_dim), [&](auto width) {
      using Tiles = ForwardTiles<T, decltype(width)::value>;
      launch_blocks(
          on,
          attention_kernel<T, decltype(width)::value>,
          Tiles::blocks(attention, sizes.batch),
          Tiles::bytes,
          forward);
    });
  });
  return {
      columns_of(output, sizes.value_dim),
      logsumexp,
      stats,
      columns_of(unrounded, sizes.value_dim)};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(
    const Tensor& grad_output,
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const Tensor& output,
    const Tensor& logsumexp,
    const std::optional<Tensor>& key_padding_mask,
    const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seed,
    bool is_causal,
    double dropout_p,
    double scale,
    double softcap,
    double clamp) {
  const AttentionOptions options{is_causal, dropout_p, scale, softcap, clamp};
  const AttentionSizes sizes = check_attention(
      "attention_backward", query, key, value, key_padding_mask, attn_mask, seed, options);
  check_attention_saved(sizes, query, grad_output, output, logsumexp);
  const Masks masks{key_padding_mask, attn_mask, seed};
  const Stream on(query);
  check_all_on(on, "attention_backward", key, value, masks);
  check_on(on, grad_output, "attention_backward", "grad_output");
  check_on(on, output, "attention_backward", "output");
  check_on(on, logsumexp, "attention_backward", "logsumexp");
  const Tensor q = with_whole_rows(query), k = with_whole_rows(key), v = with_whole_rows(value);
  // Read as many columns at a time as those of the gradient, whatever it was saved as.
  const bool is_rounded = output.scalar_type() == query.scalar_type();
  const Tensor o = with_whole_rows(output, unit_of(query)), d = with_whole_rows(grad_output);
  const Attention attention = attention_of(sizes, options, q, v, masks);

  const int64_t terms_rows = round_up(sizes.queries, padded_rows);
  const Tensor passed = empty_whole_rows(query, sizes.heads, sizes.queries, sizes.value_dim);
  const Tensor terms = on.empty({sizes.batch, sizes.heads, terms_rows, 2}, ScalarType::Float);
  const Tensor grad_query = empty_whole_rows(q, sizes.heads, sizes.queries, sizes.head_dim);
  const Tensor grad_key = empty_whole_rows(q, sizes.kv_heads, sizes.keys, sizes.head_dim);
  const Tensor grad_value = empty_whole_rows(q, sizes.kv_heads, sizes.keys, sizes.value_dim);
  with_type(query, [&](auto type) {
    using T = decltype(type);
    const Backward<T> backward{
        attention,
        static_cast<int>(sizes.batch),
        static_cast<int>(terms_rows),
        read<T>(q),
        read<T>(k),
        read<T>(v),
        is_rounded ? read<T>(o) : Heads<const T>{},
        is_rounded ? Heads<const float>{} : read<float>(o),
        read<T>(d),
        logsumexp.const_data_ptr<float>(),
        written<T>(passed),
        static_cast<RowTerms*>(terms.mutable_data_ptr()),
        written<T>(grad_query),
        written<T>(grad_key),
        written<T>(grad_value)};
    const auto delta = is_rounded ? attention_delta_kernel<T, T> : attention_delta_kernel<T, float>;
    launch_blocks(on, delta, backward.delta_blocks(), 0, backward);
    with_width<T>(std::max(attention.head_dim, attention.value_dim), [&](auto width) {
      constexpr int D = decltype(width)::value;
      using Tiles = BackwardTiles<T, D>;
      launch_blocks(
          on,
          attention_grad_query_kernel<T, D>,
          Tiles::query_blocks(backward),
          Tiles::bytes,
          backward);
      launch_blocks(
          on, attention_grad_key_kernel<T, D>, Tiles::key_blocks(backward), Tiles::bytes, backward);
    });
  });
  return {
      columns_of(grad_query, sizes.head_dim),
      columns_of(grad_key, sizes.head_dim),
      columns_of(grad_value, sizes.value_dim)};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("attention", TORCH_BOX(&fastguard::attention_cuda));
  m.impl("attention_backward", TORCH_BOX(&fastguard::attention_backward_cuda));
}
