// add_layer_norm and its backward pass. References: fastguard/ops/add_layer_norm.py. The gradients
// of weight and bias are sums over blocks of rows, which depend on shapes alone: results are the
// same for any number of threads.

#include "add_layer_norm_kernel.h"
#include "frames.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

// x (B, T, C), scale (B, C) and weight (C,) in row-major memory.
struct Inputs {
  Inputs(
      const char* op,
      const char* name,
      const Tensor& frames,
      const std::optional<Tensor>& given_scale,
      const Tensor& given_weight) {
    check_dtype(frames, op, 0);
    STD_TORCH_CHECK(
        frames.dim() == 3 && frames.size(2) > 0,
        op,
        ": ",
        name,
        " must be (B, T, C), C at least 1; got ",
        frames.dim(),
        " dimensions");
    dtype = frames.scalar_type();
    of_channel = computed_dtype(dtype);
    batch = frames.size(0), length = frames.size(1), n = frames.size(2);
    x = as_rows(op, name, frames, dtype, {batch, length, n});
    weight = as_rows(op, "weight", given_weight, of_channel, {n});
    p.rows = batch * length;
    p.rows_of_scale = length;
    p.channels = n;
    p.weight = weight.const_data_ptr();
    if (given_scale.has_value()) {
      scale = as_rows(op, "scale", *given_scale, of_channel, {batch, n});
      p.scale = scale->const_data_ptr();
    }
  }

  ScalarType dtype, of_channel;
  int64_t batch, length, n;
  Tensor x, weight;
  std::optional<Tensor> scale;
  AddLayerNorm p{};
};

int64_t blocks_of(const AddLayerNorm& p) { return (p.rows + block_rows - 1) / block_rows; }

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_cpu(
    const Tensor& x,
    const std::optional<Tensor>& branch,
    const std::optional<Tensor>& scale,
    const Tensor& weight,
    const Tensor& bias,
    double alpha,
    double eps) {
  const char* const op = "add_layer_norm";
  Inputs inputs(op, "x", x, scale, weight);
  const auto [batch, length, n] = std::tuple(inputs.batch, inputs.length, inputs.n);
  const Tensor shift = as_rows(op, "bias", bias, inputs.of_channel, {n});
  AddLayerNorm& p = inputs.p;
  p.bias = shift.const_data_ptr();
  p.alpha = alpha;
  p.eps = eps;
  p.x = inputs.x.const_data_ptr();
  p.sum = const_cast<void*>(p.x);
  Tensor added, sum = new_vector(x, inputs.dtype, 0);
  if (branch.has_value()) {
    added = as_rows(op, "branch", *branch, inputs.dtype, {batch, length, n});
    sum = new_frames(x, inputs.dtype, batch, length, n);
    p.branch = added.const_data_ptr();
    p.sum = sum.mutable_data_ptr();
  }
  const Tensor normed = new_frames(x, inputs.dtype, batch, length, n);
  const Tensor mean = new_vector(x, inputs.of_channel, p.rows);
  const Tensor rstd = new_vector(x, inputs.of_channel, p.rows);
  p.normed = normed.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  auto* const kernel = pick(FASTGUARD_BEST_OF(add_layer_norm_kernels).forward, inputs.dtype);
  for_each_part(blocks_of(p), x.numel(), [&](int64_t i) { kernel(p, i); });
  return {sum, normed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_cpu(
    const std::optional<Tensor>& grad_sum,
    const Tensor& grad_normed,
    const Tensor& sum,
    const std::optional<Tensor>& scale,
    const Tensor& weight,
    const Tensor& mean,
    const Tensor& rstd,
    double alpha,
    bool has_branch) {
  const char* const op = "add_layer_norm_backward";
  Inputs inputs(op, "sum", sum, scale, weight);
  const auto [batch, length, n] = std::tuple(inputs.batch, inputs.length, inputs.n);
  AddLayerNorm& p = inputs.p;
  const Tensor of_normed =
      as_rows(op, "grad_normed", grad_normed, inputs.dtype, {batch, length, n});
  const Tensor means = as_rows(op, "mean", mean, inputs.of_channel, {p.rows});
  const Tensor rstds = as_rows(op, "rstd", rstd, inputs.of_channel, {p.rows});
  Tensor of_sum, grad_branch = new_vector(sum, inputs.dtype, 0);
  if (grad_sum.has_value()) {
    of_sum = as_rows(op, "grad_sum", *grad_sum, inputs.dtype, {batch, length, n});
    p.grad_sum = of_sum.const_data_ptr();
  }
  if (has_branch) {
    grad_branch = new_frames(sum, inputs.dtype, batch, length, n);
    p.grad_branch = grad_branch.mutable_data_ptr();
  }
  const Tensor grad_x = new_frames(sum, inputs.dtype, batch, length, n);
  const Tensor grad_weight = new_vector(sum, inputs.of_channel, n);
  const Tensor grad_bias = new_vector(sum, inputs.of_channel, n);
  const Tensor partial = new_frames(sum, inputs.of_channel, blocks_of(p), 2, n);
  p.alpha = alpha;
  p.sum = const_cast<void*>(inputs.x.const_data_ptr());
  p.mean = const_cast<void*>(means.const_data_ptr());
  p.rstd = const_cast<void*>(rstds.const_data_ptr());
  p.grad_normed = of_normed.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.partial = partial.mutable_data_ptr();
  const AddLayerNormKernels& kernels = FASTGUARD_BEST_OF(add_layer_norm_kernels);
  auto* const kernel = pick(kernels.backward, inputs.dtype);
  for_each_part(blocks_of(p), sum.numel(), [&](int64_t i) { kernel(p, i); });
  pick(kernels.add_partials, inputs.dtype)(p);
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&fastguard::add_layer_norm_cpu));
  m.impl("add_layer_norm_backward", TORCH_BOX(&fastguard::add_layer_norm_backward_cpu));
}
