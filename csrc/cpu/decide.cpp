#include "decide.h"
#include "checks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> decide_cpu(const Tensor& total_norm, double max_norm, double skip_norm) {
  fastguard::check_total_norm(total_norm);
  const fastguard::Decision decision =
      fastguard::decide(*total_norm.const_data_ptr<double>(), max_norm, skip_norm);
  Tensor clip_coef = torch::stable::empty({}, ScalarType::Double);
  Tensor verdict = torch::stable::empty({}, ScalarType::Long);
  *clip_coef.mutable_data_ptr<double>() = decision.clip_coef;
  *verdict.mutable_data_ptr<int64_t>() = static_cast<int64_t>(decision.verdict);
  return {clip_coef, verdict};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) { m.impl("decide", TORCH_BOX(&decide_cpu)); }
