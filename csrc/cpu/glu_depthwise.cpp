// glu_depthwise and its backward pass. References: fastguard/ops/glu_depthwise.py. How frames and
// channels are cut into tasks depends on shapes alone: results are the same for any number of
// threads.

#include "frames.h"
#include "glu_depthwise_kernel.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace fastguard {
namespace {

using torch::stable::Tensor;

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

struct Inputs {
  Inputs(const char* op, const Tensor& frames, const Tensor& padding_mask, const Tensor& weight) {
    check_dtype(frames, op, 0);
    STD_TORCH_CHECK(
        frames.dim() == 3 && frames.size(2) % 2 == 0,
        op,
        ": x must be (B, T, 2 C); got ",
        frames.dim(),
        " dimensions, the last of ",
        frames.dim() > 0 ? frames.size(frames.dim() - 1) : 0);
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(1) % 2 == 1 && weight.size(1) <= most_taps,
        op,
        ": weight must be (C, K), K odd and at most ",
        most_taps,
        "; got ",
        weight.dim(),
        " dimensions, the last of ",
        weight.dim() > 0 ? weight.size(weight.dim() - 1) : 0);
    dtype = frames.scalar_type();
    of_channel = computed_dtype(dtype);
    p.batch = frames.size(0), p.frames = frames.size(1), p.channels = frames.size(2) / 2;
    p.taps = weight.size(1);
    x = torch::stable::contiguous(frames);
    padding = as_rows(op, "padding_mask", padding_mask, ScalarType::Bool, {p.batch, p.frames});
    filters = as_rows(op, "weight", weight, of_channel, {p.channels, p.taps});
    p.x = x.const_data_ptr();
    p.padded = static_cast<const uint8_t*>(padding.const_data_ptr());
    p.weight = filters.const_data_ptr();
  }

  ScalarType dtype, of_channel;
  GluDepthwise p{};
  Tensor x, padding, filters;
};

Tensor glu_depthwise_cpu(const Tensor& x, const Tensor& padding_mask, const Tensor& weight) {
  Inputs inputs("glu_depthwise", x, padding_mask, weight);
  GluDepthwise& p = inputs.p;
  const Tensor output = new_frames(x, inputs.dtype, p.batch, p.frames, p.channels);
  p.output = output.mutable_data_ptr();
  auto* const kernel = pick(FASTGUARD_BEST_OF(glu_depthwise_kernels).forward, inputs.dtype);
  const int64_t blocks = parts(p.frames, block_frames), strips = parts(p.channels, strip_channels);
  for_each_part(p.batch * blocks * strips, x.numel(), [&](int64_t i) {
    const int64_t block = i / strips;
    kernel(p, block / blocks, block % blocks * block_frames, i % strips * strip_channels);
  });
  return output;
}

std::tuple<Tensor, Tensor> glu_depthwise_backward_cpu(
    const Tensor& grad_output, const Tensor& x, const Tensor& padding_mask, const Tensor& weight) {
  const char* const op = "glu_depthwise_backward";
  Inputs inputs(op, x, padding_mask, weight);
  GluDepthwise& p = inputs.p;
  const Tensor grad =
      as_rows(op, "grad_output", grad_output, inputs.dtype, {p.batch, p.frames, p.channels});
  const Tensor grad_x = new_frames(x, inputs.dtype, p.batch, p.frames, 2 * p.channels);
  const Tensor grad_weight =
      empty_strided(x, {p.channels, p.taps}, {p.taps, 1}, shim_dtype(inputs.of_channel));
  p.grad_output = grad.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  auto* const kernel = pick(FASTGUARD_BEST_OF(glu_depthwise_kernels).backward, inputs.dtype);
  for_each_part(parts(p.channels, strip_channels), x.numel(), [&](int64_t i) {
    kernel(p, i * strip_channels);
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("glu_depthwise", TORCH_BOX(&fastguard::glu_depthwise_cpu));
  m.impl("glu_depthwise_backward", TORCH_BOX(&fastguard::glu_depthwise_backward_cpu));
}
