// settle_: on a skip the buffers are set back to their saved copies, otherwise the copies are
// brought up to date. Reference: settle_ref_ in fastguard/ops.py.

#include "checks.h"
#include "decide.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

namespace {

using torch::stable::Tensor;

void settle_cpu(const std::vector<Tensor>& buffers, const std::vector<Tensor>& saved, const Tensor& verdict) {
  fastguard::check_settle(buffers, saved, verdict);
  const bool restore = fastguard::skips(*verdict.const_data_ptr<int64_t>());
  for (size_t i = 0; i < buffers.size(); ++i) {
    Tensor to = restore ? buffers[i] : saved[i];
    torch::stable::copy_(to, restore ? saved[i] : buffers[i]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("settle_", TORCH_BOX(&settle_cpu));
}
