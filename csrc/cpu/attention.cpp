// attention and attention_backward. References: fastguard/ops/attention.py. What runs on a row of
// the query does not depend on how rows are cut into tasks, and how keys are cut depends on shapes
// alone: results are the same for any number of threads.

#include "attention.h"
#include "attention_kernel.h"
#include "capability.h"
#include "tasks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static_assert(most_head_dim == most_columns);

const AttentionKernel& kernel_for(ScalarType dtype) {
  const AttentionKernels& kernels = FASTGUARD_BEST_OF(attention_kernels);
  switch (dtype) {
    case ScalarType::Double:
      return kernels.float64;
    case ScalarType::Half:
      return kernels.float16;
    case ScalarType::BFloat16:
      // Products of bf16 numbers have instructions of their own.
      return *Variants<AttentionKernel>{
          &kernels.bfloat16,
          nullptr,
          nullptr,
          FASTGUARD_IF_AVX512_BF16(attention_bf16_kernel_avx512_bf16),
          FASTGUARD_IF_AMX(attention_bf16_kernel_amx)}
                  .best();
    default:
      return kernels.float32;
  }
}

// A tensor whose rows are contiguous.
Tensor with_rows(const Tensor& tensor) {
  return tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Heads heads_of(const Tensor& tensor) {
  return {
      const_cast<void*>(tensor.const_data_ptr()),
      tensor.stride(0),
      tensor.stride(1),
      tensor.stride(2)};
}

AttentionMask mask_of(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) {
    return {};
  }
  const ScalarType type = mask->scalar_type();
  const bool wide = type == ScalarType::Float || type == ScalarType::Double;
  return {
      mask->const_data_ptr(),
      type == ScalarType::Bool ? MaskKind::shown
          : wide               ? MaskKind::wide
                               : MaskKind::narrow,
      mask->stride(0),
      mask->stride(1),
      mask->stride(2),
      mask->stride(3)};
}

// Padding as bytes: a bool tensor that was made as a view of bytes may hold any.
std::vector<Panel> panels_of(int64_t keys, const uint8_t* padded, int64_t step, int64_t unit) {
  std::vector<Panel> panels;
  for (int64_t first = 0; first < keys; first += panel_keys) {
    Panel panel{first, 0, 0};
    for (int64_t j = 0; j < std::min(panel_keys, keys - first); ++j) {
      if (padded == nullptr || padded[(first + j) * step] == 0) {
        panel.keep |= uint64_t{1} << j;
        panel.columns = j + 1;
      }
    }
    panel.columns = (panel.columns + unit - 1) / unit * unit;
    if (panel.keep != 0) {
      panels.push_back(panel);
    }
  }
  return panels;
}

// What a problem points into.
struct Inputs {
  Inputs(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const std::optional<Tensor>& key_padding_mask,
      int64_t key_unit)
      : query(with_rows(q)), key(with_rows(k)), value(with_rows(v)) {
    for (int64_t b = 0; b < key.size(0); ++b) {
      const uint8_t* padded = nullptr;
      int64_t step = 0;
      if (key_padding_mask.has_value()) {
        padded = static_cast<const uint8_t*>(key_padding_mask->const_data_ptr()) +
            b * key_padding_mask->stride(0);
        step = key_padding_mask->stride(1);
      }
      panels.push_back(panels_of(key.size(2), padded, step, key_unit));
    }
    for (const std::vector<Panel>& each : panels) {
      lists.push_back({each.data(), static_cast<int64_t>(each.size())});
    }
  }

  Tensor query, key, value;
  std::vector<std::vector<Panel>> panels;
  std::vector<PanelList> lists;
};

AttentionProblem problem_of(
    const AttentionSizes& sizes,
    const Inputs& inputs,
    const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& seed,
    const AttentionOptions& options) {
  AttentionProblem p{};
  p.batch = sizes.batch;
  p.heads = sizes.heads;
  p.kv_heads = sizes.kv_heads;
  p.queries = sizes.queries;
  p.keys = sizes.keys;
  p.head_dim = sizes.head_dim;
  p.value_dim = sizes.value_dim;
  p.query = heads_of(inputs.query);
  p.key = heads_of(inputs.key);
  p.value = heads_of(inputs.value);
  p.mask = mask_of(attn_mask);
  p.seed = options.dropout_p > 0.0 ? seed->const_data_ptr<int64_t>() : nullptr;
  p.dropout_p = options.dropout_p;
  p.scale = options.scale;
  p.softcap = options.softcap;
  p.clamp = options.clamp;
  p.is_causal = options.is_causal;
  p.panels = inputs.lists.data();
  return p;
}

// Memory for each thread, which starts as no task's.
class Scratch {
 public:
  Scratch(int64_t bytes, bool parallel) : bytes_((bytes + 63) / 64 * 64) {
    const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
    memory_.reset(static_cast<char*>(::operator new(bytes_ * threads, alignment, std::nothrow)));
    STD_TORCH_CHECK(
        memory_ != nullptr,
        "attention: not enough memory: ",
        threads,
        " threads need ",
        bytes_,
        " bytes each beside the tensors; use fewer threads (torch.set_num_threads) or shorter "
        "keys");
  }

  char* of(int64_t thread) const {
    char* const first = memory_.get() + thread * bytes_;
    std::memset(first, 0xff, 64);
    return first;
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, alignment); }
  };

  int64_t bytes_;
  std::unique_ptr<char, Delete> memory_;
};

// Whether a parallel region costs less than it saves.
bool is_much(const AttentionSizes& sizes) {
  constexpr double serial_products = 1 << 17;
  return static_cast<double>(sizes.batch) * sizes.heads * sizes.queries * sizes.keys *
      sizes.head_dim >
      serial_products;
}

// Rows of a task: whole heads if they are enough to keep all threads busy.
int64_t rows_of_task(const AttentionSizes& sizes) {
  const int64_t heads = std::max<int64_t>(1, sizes.batch * sizes.heads);
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t blocks = (sizes.queries + row_block - 1) / row_block;
  const int64_t parts = std::clamp<int64_t>((wanted + heads - 1) / heads, 1, blocks);
  return (blocks + parts - 1) / parts * row_block;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_cpu(
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
  const AttentionKernel& kernel = kernel_for(query.scalar_type());
  const Inputs inputs(query, key, value, key_padding_mask, kernel.key_unit);
  AttentionProblem p = problem_of(sizes, inputs, attn_mask, seed, options);
  const Tensor output =
      empty_heads(query, sizes.batch, sizes.heads, sizes.queries, sizes.value_dim);
  const int64_t b = sizes.batch, h = sizes.heads, t = sizes.queries;
  const Tensor logsumexp = empty_strided(query, {b, h, t}, {h * t, t, 1}, sums_of(query));
  const Tensor stats = return_stats
      ? empty_strided(query, {2, b, h, t}, {b * h * t, h * t, t, 1}, sums_of(query))
      : empty_strided(query, {0}, {1}, sums_of(query));
  const Tensor unrounded = return_unrounded ? empty_heads(query, b, h, t, sizes.value_dim, true)
                                            : empty_strided(query, {0}, {1}, sums_of(query));
  p.output = heads_of(output);
  p.unrounded = return_unrounded ? heads_of(unrounded) : Heads{};
  p.logsumexp = logsumexp.mutable_data_ptr();
  p.stats = return_stats ? stats.mutable_data_ptr() : nullptr;

  const bool parallel = is_much(sizes);
  const Scratch scratch(kernel.forward_scratch(p), parallel);
  const int64_t step = rows_of_task(sizes), parts = (sizes.queries + step - 1) / step;
  for_each_task(sizes.batch * sizes.heads * parts, 1, parallel, [&](int64_t thread) {
    return [&, memory = scratch.of(thread)](int64_t i) {
      const int64_t head = i / parts, begin = i % parts * step;
      const int64_t b = head / sizes.heads, h = head % sizes.heads;
      kernel.forward(p, {b, h, begin, std::min(begin + step, sizes.queries)}, memory);
    };
  });
  return {output, logsumexp, stats, unrounded};
}

// The fewer heads there are the more parts the keys are cut into, so that many threads find work;
// by shapes alone, for each part has a sum of its own for each head of the query. A part costs a
// packing of the query: 10 to 20 % of a chunk of 192 keys, so that 16 heads are left whole.
int64_t chunks_of(const AttentionSizes& sizes) {
  constexpr int64_t many_heads = 16, enough_tasks = 32, fewest_keys = 128, most_sums = 64;
  const int64_t heads = std::max<int64_t>(1, sizes.batch * sizes.kv_heads);
  const int64_t wanted = heads >= many_heads ? 1 : (enough_tasks + heads - 1) / heads;
  const int64_t most = std::min(
      (sizes.keys + fewest_keys - 1) / fewest_keys,
      most_sums / std::max<int64_t>(1, sizes.batch * sizes.heads));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, most));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(
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
  const AttentionKernel& kernel = kernel_for(query.scalar_type());
  const Inputs inputs(query, key, value, key_padding_mask, kernel.key_unit);
  const Tensor grad_rows = with_rows(grad_output), output_rows = with_rows(output);
  AttentionProblem p = problem_of(sizes, inputs, attn_mask, seed, options);
  (output.scalar_type() == query.scalar_type() ? p.output : p.unrounded) = heads_of(output_rows);
  p.logsumexp = const_cast<void*>(logsumexp.const_data_ptr());
  p.grad_output = heads_of(grad_rows);
  const Tensor grad_query =
      empty_heads(query, sizes.batch, sizes.heads, sizes.queries, sizes.head_dim);
  const Tensor grad_key =
      empty_heads(query, sizes.batch, sizes.kv_heads, sizes.keys, sizes.head_dim);
  const Tensor grad_value =
      empty_heads(query, sizes.batch, sizes.kv_heads, sizes.keys, sizes.value_dim);
  p.grad_query = heads_of(grad_query);
  p.grad_key = heads_of(grad_key);
  p.grad_value = heads_of(grad_value);
  p.chunks = chunks_of(sizes);
  const int64_t d = sizes.head_dim, of_head = sizes.queries * d;
  const int64_t of_utterance = sizes.heads * of_head, of_chunk = sizes.batch * of_utterance;
  const Tensor partial = empty_strided(
      query,
      {p.chunks > 1 ? p.chunks : 0, sizes.batch, sizes.heads, sizes.queries, d},
      {of_chunk, of_utterance, of_head, d, 1},
      sums_of(query));
  p.partial_grad_query = p.chunks > 1 ? partial.mutable_data_ptr() : nullptr;

  const bool parallel = is_much(sizes);
  const Scratch scratch(kernel.backward_scratch(p), parallel);
  for_each_task(sizes.batch * sizes.kv_heads * p.chunks, 1, parallel, [&](int64_t thread) {
    return [&, memory = scratch.of(thread)](int64_t i) {
      const int64_t head = i / p.chunks;
      kernel.backward(p, {head / sizes.kv_heads, head % sizes.kv_heads, i % p.chunks}, memory);
    };
  });
  if (p.chunks > 1) {
    for_each_task(sizes.batch * sizes.heads, 1, parallel, [&](int64_t) {
      return [&](int64_t head) { kernel.add_partials(p, head / sizes.heads, head % sizes.heads); };
    });
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastguard::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&fastguard::attention_backward_cpu));
}
