// masked_batch_norm and its backward pass. References: fastguard/ops/masked_batch_norm.py. A strip
// of channels is one task: results are the same for any number of threads.

#include "frames.h"
#include "masked_batch_norm_kernel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

// x (B, T, C), the padding and what belongs to a channel, each in row-major memory.
struct Inputs {
  Inputs(
      const char* op,
      const Tensor& frames,
      const Tensor& padding_mask,
      const Tensor& weight,
      const Tensor& bias) {
    check_dtype(frames, op, 0);
    STD_TORCH_CHECK(
        frames.dim() == 3, op, ": x must be (B, T, C); got ", frames.dim(), " dimensions");
    dtype = frames.scalar_type();
    of_channel = computed_dtype(dtype);
    batch = frames.size(0), length = frames.size(1), channels = frames.size(2);
    x = torch::stable::contiguous(frames);
    padding = as_rows(op, "padding_mask", padding_mask, ScalarType::Bool, {batch, length});
    scale = as_rows(op, "weight", weight, of_channel, {channels});
    shift = as_rows(op, "bias", bias, of_channel, {channels});
  }

  MaskedBatchNorm problem(double eps, bool silu) const {
    MaskedBatchNorm p{};
    p.frames = batch * length;
    p.channels = channels;
    p.padded = static_cast<const uint8_t*>(padding.const_data_ptr());
    p.valid = std::count(p.padded, p.padded + p.frames, 0);
    p.eps = eps;
    p.silu = silu;
    p.x = x.const_data_ptr();
    p.weight = scale.const_data_ptr();
    p.bias = shift.const_data_ptr();
    return p;
  }

  void run(void (*kernel)(const MaskedBatchNorm&, int64_t), const MaskedBatchNorm& p) const {
    const int64_t strips = (channels + strip_channels - 1) / strip_channels;
    for_each_part(strips, x.numel(), [&](int64_t i) { kernel(p, i * strip_channels); });
  }

  ScalarType dtype, of_channel;
  int64_t batch, length, channels;
  Tensor x, padding, scale, shift;
};

std::tuple<Tensor, Tensor, Tensor> masked_batch_norm_cpu(
    const Tensor& x,
    const Tensor& padding_mask,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& running_mean,
    const Tensor& running_var,
    double eps,
    bool training,
    bool silu) {
  const char* const op = "masked_batch_norm";
  const Inputs inputs(op, x, padding_mask, weight, bias);
  const Tensor known_mean =
      as_rows(op, "running_mean", running_mean, inputs.of_channel, {inputs.channels});
  const Tensor known_var =
      as_rows(op, "running_var", running_var, inputs.of_channel, {inputs.channels});
  MaskedBatchNorm p = inputs.problem(eps, silu);
  p.of_batch = training && p.valid >= 2;
  const Tensor output = new_frames(x, inputs.dtype, inputs.batch, inputs.length, inputs.channels);
  const Tensor mean = new_vector(x, inputs.of_channel, inputs.channels);
  const Tensor var = new_vector(x, inputs.of_channel, inputs.channels);
  p.output = output.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.var = var.mutable_data_ptr();
  if (!p.of_batch && inputs.channels > 0) {
    const size_t bytes = inputs.channels * mean.element_size();
    std::memcpy(p.mean, known_mean.const_data_ptr(), bytes);
    std::memcpy(p.var, known_var.const_data_ptr(), bytes);
  }
  inputs.run(pick(FASTGUARD_BEST_OF(masked_batch_norm_kernels).forward, inputs.dtype), p);
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> masked_batch_norm_backward_cpu(
    const Tensor& grad_output,
    const Tensor& x,
    const Tensor& padding_mask,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& var,
    double eps,
    bool training,
    bool silu) {
  const char* const op = "masked_batch_norm_backward";
  const Inputs inputs(op, x, padding_mask, weight, bias);
  const auto [batch, length, n] = std::tuple(inputs.batch, inputs.length, inputs.channels);
  const Tensor grad = as_rows(op, "grad_output", grad_output, inputs.dtype, {batch, length, n});
  const Tensor known_mean = as_rows(op, "mean", mean, inputs.of_channel, {n});
  const Tensor known_var = as_rows(op, "var", var, inputs.of_channel, {n});
  MaskedBatchNorm p = inputs.problem(eps, silu);
  p.of_batch = training && p.valid >= 2;
  const Tensor grad_x = new_frames(x, inputs.dtype, batch, length, n);
  const Tensor grad_weight = new_vector(x, inputs.of_channel, n);
  const Tensor grad_bias = new_vector(x, inputs.of_channel, n);
  p.mean = const_cast<void*>(known_mean.const_data_ptr());
  p.var = const_cast<void*>(known_var.const_data_ptr());
  p.grad_output = grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  inputs.run(pick(FASTGUARD_BEST_OF(masked_batch_norm_kernels).backward, inputs.dtype), p);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("masked_batch_norm", TORCH_BOX(&fastguard::masked_batch_norm_cpu));
  m.impl("masked_batch_norm_backward", TORCH_BOX(&fastguard::masked_batch_norm_backward_cpu));
}
