// settle_ on CUDA.
#include "cuda/settle.cuh"

#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

// Which way a copy goes is known on the device alone, so both must be memory that can be copied as
// it is; fastguard/ops.py passes no others.
void check_memory(const Tensor& buffer, const Tensor& saved, size_t i) {
  STD_TORCH_CHECK(
      buffer.strides().equals(saved.strides()) && !densify(buffer).copied,
      "settle_: buffer ",
      i,
      " has gaps, or its saved copy lies in another order");
}

void settle_cuda(
    const std::vector<Tensor>& buffers, const std::vector<Tensor>& saved, const Tensor& verdict) {
  check_settle(buffers, saved, verdict);
  const Stream on(verdict);
  check_devices(buffers, on.device, "settle_");
  check_devices(saved, on.device, "settle_");
  std::vector<Given> given;
  for (size_t i = 0; i < buffers.size(); ++i) {
    check_memory(buffers[i], saved[i], i);
    Tensor buffer = buffers[i], copy = saved[i];
    const int64_t bytes = buffer.numel() * static_cast<int64_t>(buffer.element_size());
    given.push_back(
        {buffer.mutable_data_ptr(), copy.mutable_data_ptr(), bytes, Type::byte, Type::byte, {}});
  }
  const DevicePlan prepared = plan_of(on, given);
  launch(
      on,
      settle_kernel,
      {blocks_for(on, settle_kernel, prepared.plan.n_chunks)},
      prepared.plan,
      verdict.const_data_ptr<int64_t>());
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("settle_", TORCH_BOX(&fastguard::settle_cuda));
}
