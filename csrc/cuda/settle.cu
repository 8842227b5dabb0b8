// settle_ on CUDA.
#include "cuda/settle.cuh"

#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Only the device knows the direction of a copy, so both tensors must have memory that can be
// copied as it is. fastguard/ops/settle.py passes no others.
void check_memory(const Tensor& buffer, const Tensor& saved, size_t i) {
  STD_TORCH_CHECK(
      buffer.strides().equals(saved.strides()) && !densify(buffer).copied,
      "settle_: buffer ",
      i,
      " has gaps, or its saved copy lies in another order");
}

// Elements that are no floating-point numbers count as bytes.
Given given_of(Tensor buffer, Tensor saved) {
  const int64_t numbers = numbers_in(buffer.scalar_type());
  const Type type = numbers == 0 ? Type::byte : type_of(real_of(buffer.scalar_type()));
  const int64_t per_element = numbers == 0 ? static_cast<int64_t>(buffer.element_size()) : numbers;
  return {
      buffer.mutable_data_ptr(),
      saved.mutable_data_ptr(),
      buffer.numel() * per_element,
      type,
      type,
      {}};
}

Tensor settle_cuda(
    const std::vector<Tensor>& buffers,
    const std::vector<Tensor>& saved,
    const Tensor& verdict,
    const Tensor& owners) {
  check_settle(buffers, saved, verdict, owners);
  const Stream on(verdict);
  check_devices(buffers, on.device, "settle_");
  check_devices(saved, on.device, "settle_");
  check_on(on, owners, "settle_", "owners");
  std::vector<Given> given;
  for (size_t i = 0; i < buffers.size(); ++i) {
    check_memory(buffers[i], saved[i], i);
    given.push_back(given_of(buffers[i], saved[i]));
  }
  Tensor result = torch::stable::new_zeros(
      verdict, {2 * static_cast<int64_t>(buffers.size())}, ScalarType::Int);
  auto* const lost = reinterpret_cast<unsigned*>(result.mutable_data_ptr<int32_t>());
  const DevicePlan prepared = plan_of(on, given);
  const int64_t* const of_step = verdict.const_data_ptr<int64_t>();
  const int64_t* const owner = owners.const_data_ptr<int64_t>();
  const int blocks = blocks_for(on, find_lost_kernel, prepared.plan.n_chunks);
  launch(on, find_lost_kernel, {blocks}, prepared.plan, of_step, owner, lost);
  const int more = blocks_for(on, settle_kernel, prepared.plan.n_chunks);
  launch(on, settle_kernel, {more}, prepared.plan, of_step, owner, lost);
  return result;
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("settle_", TORCH_BOX(&fastguard::settle_cuda));
}
