// Every op of fastguard, one list. Kernels register themselves from csrc/cpu and csrc/cuda;
// fake kernels, references and docstrings are in fastguard/ops.py.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastguard, m) {
  // -> total_norm f64 (), norms f64 (N,), nonfinite_counts i64 (N,), first_nonfinite i64 (2,)
  m.def("grad_norm(Tensor[] grads) -> (Tensor, Tensor, Tensor, Tensor)");

  // -> clip_coef f64 (), verdict i64 ()
  m.def("decide(Tensor total_norm, float max_norm, float skip_norm) -> (Tensor, Tensor)");

  // Writes nothing when clip_coef is 1.
  m.def("scale_(Tensor(a!)[] grads, Tensor clip_coef) -> ()");

  // Writes nothing when the verdict is a skip. grad_coef f64 () or (N,), verdict i64 ().
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, "
      "Tensor grad_coef, Tensor verdict, float lr, float beta1, float beta2, float weight_decay, "
      "float eps, bool decoupled_weight_decay, bool amsgrad, bool maximize) -> ()");

  // What was built and chosen, one "key=value" a line; for `python -m fastguard.env`.
  m.def("cpu_info() -> str");
  m.def("cuda_info() -> str");
}
