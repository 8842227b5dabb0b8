// The list of all ops of fastguard. The kernels of csrc/cpu and csrc/cuda register themselves. Fake
// kernels, references and docstrings are in fastguard/ops/.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastguard, m) {
  // -> total_norm f64 (), norms f64 (N,), nonfinite i64 (N, 3): NaNs, Infs, first index
  m.def("grad_norm(Tensor[] grads) -> (Tensor, Tensor, Tensor)");

  // -> clip_coef f64 (), verdict i64 ()
  m.def("decide(Tensor total_norm, float max_norm, float skip_norm) -> (Tensor, Tensor)");

  // The same with the statistics of earlier norms, which it updates: statistics f64 (4,) as
  // struct Statistics, windows of W norms, per_tensor f64 (4, N) as struct TensorStatistics, or (4,
  // 0)
  // -> grad_coef f64 () or (N,), verdict i64 (), record f64 (6,) as struct Record
  m.def(
      "guard_decide_(Tensor total_norm, Tensor norms, Tensor? unscale, Tensor? loss, "
      "Tensor(a!) statistics, Tensor(b!) seen_norms, Tensor(c!) accepted_norms, "
      "Tensor(d!) per_tensor, int step, int threshold, float max_norm, float skip_norm, "
      "float[] options) -> (Tensor, Tensor, Tensor)");

  // Both in one, in one launch on CUDA, and the GradScaler's update (growth: growth factor, backoff
  // factor, growth interval) -> the results of both
  m.def(
      "grad_norm_decide_(Tensor[] grads, Tensor? unscale, Tensor? loss, Tensor(a!) statistics, "
      "Tensor(b!) seen_norms, Tensor(c!) accepted_norms, Tensor(d!) per_tensor, int step, "
      "int threshold, float max_norm, float skip_norm, float[] options, Tensor(e!)? scale, "
      "Tensor(f!)? growth_tracker, float[] growth) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // grad_norm, decide and scale_ in one, in one launch on CUDA; float32_norm: the decision is about
  // the norm rounded to float32 -> total_norm, norms, nonfinite, clip_coef, verdict
  m.def(
      "clip_(Tensor(a!)[] grads, float max_norm, float skip_norm, bool float32_norm) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Writes nothing if clip_coef is 1; its shape is () or (N,).
  m.def("scale_(Tensor(a!)[] grads, Tensor clip_coef) -> ()");

  // On a skip buffers = saved, else saved = buffers. But if a buffer is finite in saved and is not
  // now, buffers = saved for all buffers of its owner. owners i64 (N,), 0 to N - 1
  // -> lost i32 (2 N,): nonzero for each such buffer, and then for each such owner
  m.def(
      "settle_(Tensor(a!)[] buffers, Tensor(b!)[] saved, Tensor verdict, Tensor owners) -> Tensor");

  // sums += grads unless the verdict is a skip; sums f64 for f64 gradients, else f32; window f64
  // (3,): seen, good, weight of the good
  m.def(
      "accumulate_(Tensor(a!)[] sums, Tensor[] grads, Tensor verdict, Tensor(b!) window, "
      "float weight) -> ()");

  // Writes nothing when the verdict is a skip. The state is packed, see csrc/packed.h: moments
  // f32 or f64 (offsets[N],), max_exp_avg_sq (0,) without amsgrad, state_steps f32 (N,).
  // grad_coef f64 () or (N,), verdict i64 (), master_param f32 (offsets[N],) where all params are
  // bf16 or f16.
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) max_exp_avg_sq, Tensor(e!) state_steps, "
      "Tensor grad_coef, Tensor verdict, float lr, float beta1, float beta2, float weight_decay, "
      "float eps, bool decoupled_weight_decay, bool amsgrad, bool maximize, "
      "Tensor(f!)? master_param=None) -> ()");

  // clamp(dropout(softmax(softcap(scale q k^T) + attn_mask)) v). query (B, H, T, D), key (B, G, S,
  // D), value (B, G, S, Dv), key_padding_mask bool (B, S), True: left out; attn_mask (B, H, T, S)
  // of any strides, bool, True: takes part, or of the query's dtype or float32 (float64 for a
  // float64 query), added; seed
  // i64 (2,) where dropout_p > 0; softcap 0: none; clamp inf: none
  // -> output (B, H, T, Dv), logsumexp f32 (B, H, T) (f64 for f64; inf where a row has no key),
  // stats of its dtype (2, B, H, T): largest logit, entropy in nats; (0,) unless return_stats;
  // unrounded of its dtype (B, H, T, Dv): the output before it is rounded to 16 bits, in memory of
  // its own; (0,) unless return_unrounded
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, "
      "Tensor? attn_mask, Tensor? seed, bool is_causal, float dropout_p, float scale, "
      "float softcap, float clamp, bool return_stats, bool return_unrounded) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // output: that, or unrounded, which is nearer where rows see few keys
  // -> gradients of query, key and value
  m.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor logsumexp, Tensor? key_padding_mask, Tensor? attn_mask, "
      "Tensor? seed, bool is_causal, float dropout_p, float scale, float softcap, float clamp) -> "
      "(Tensor, Tensor, Tensor)");

  // x sigmoid(x), of any shape; contiguous results
  m.def("silu(Tensor x) -> Tensor");
  m.def("silu_backward(Tensor grad_output, Tensor x) -> Tensor");

  // Layers of the speech models. Frames are (B, T, C); what belongs to a channel or to a frame is
  // f64 for f64 frames, else f32; padding_mask bool (B, T), True: no frame.
  //
  // sum = x + alpha scale branch, scale (B, C) or none: ones; and the layer norm of sum, or of x
  // without a branch, with weight and bias (C,)
  // -> sum, (0,) without a branch; normed; mean (B T,) and rstd (B T,)
  m.def(
      "add_layer_norm(Tensor x, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, "
      "float alpha, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> gradients of x, branch ((0,) without one), weight and bias
  m.def(
      "add_layer_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor? scale, "
      "Tensor weight, Tensor mean, Tensor rstd, float alpha, bool has_branch) -> "
      "(Tensor, Tensor, Tensor, Tensor)");

  // Batch norm over the frames that are not padding, then silu where asked for; weight, bias,
  // running_mean and running_var (C,). Evaluation, and fewer than 2 valid frames, use the running
  // statistics -> output (B, T, C), and the mean and the variance that were used, (C,)
  m.def(
      "masked_batch_norm(Tensor x, Tensor padding_mask, Tensor weight, Tensor bias, "
      "Tensor running_mean, Tensor running_var, float eps, bool training, bool silu) -> "
      "(Tensor, Tensor, Tensor)");
  // -> gradients of x, weight and bias
  m.def(
      "masked_batch_norm_backward(Tensor grad_output, Tensor x, Tensor padding_mask, "
      "Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, bool training, bool silu) "
      "-> (Tensor, Tensor, Tensor)");

  // GLU of x (B, T, 2 C), zeros where there is padding, and a filter for each channel, weight (C,
  // K), K odd and at most 65, over frames; zeros beyond both ends -> (B, T, C)
  m.def("glu_depthwise(Tensor x, Tensor padding_mask, Tensor weight) -> Tensor");
  // -> gradients of x and weight
  m.def(
      "glu_depthwise_backward(Tensor grad_output, Tensor x, Tensor padding_mask, Tensor weight) -> "
      "(Tensor, Tensor)");

  // The build and the chosen instruction set, one "key=value" per line, for `python -m
  // fastguard.env`.
  m.def("cpu_info() -> str");
  m.def("cuda_info() -> str");
}
