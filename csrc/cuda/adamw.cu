// adamw_ on CUDA.
#include "cuda/adamw.cuh"

#include "adamw.h"
#include "cuda/tensors.h"

#include <torch/csrc/stable/library.h>

namespace fastguard {
namespace {

using torch::stable::Tensor;

void check_device(const TensorView& tensor, int device, const char* name, size_t index) {
  STD_TORCH_CHECK(
      cuda_device_of(tensor.handle()) == device,
      "adamw_: ",
      name,
      "[",
      index,
      "] is not on cuda:",
      device,
      " as the first parameter is; call it once for each device");
}

// The address of the pack; null if it is empty, as max_exp_avg_sq is without amsgrad.
void* data_of(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr();
}

void step(const adamw::Arguments& given) {
  adamw::check(given);
  const NoGrad no_grad;
  if (given.params.size() == 0) {
    return;
  }
  const Stream on(given.params[0].tensor());
  for (int role = adamw::exp_avg; role < adamw::roles; ++role) {
    check_on(on, given.moments[role], "adamw_", adamw::names[role]);
  }
  if (given.master_param) {
    check_on(on, *given.master_param, "adamw_", "master_param");
  }
  check_on(on, given.state_steps, "adamw_", "state_steps");
  check_on(on, given.grad_coef, "adamw_", "grad_coef");
  check_on(on, given.verdict, "adamw_", "verdict");
  adamw::StandIns stand_ins;
  std::vector<Given> tensors;
  for (size_t i = 0; i < given.params.size(); ++i) {
    const TensorView& p = given.params[i];
    const TensorView& g = given.grads[i];
    check_device(p, on.device, "params", i);
    check_device(g, on.device, "grads", i);
    const adamw::Places places = stand_ins.place(p, g);
    tensors.push_back(
        {places.param,
         places.grad,
         p.numel(),
         type_of(p.scalar_type()),
         type_of(g.scalar_type()),
         {}});
  }
  const DevicePlan prepared = plan_of(on, tensors);
  const bool masters = given.master_param.has_value();
  const auto kernel = given.amsgrad
      ? (masters ? adamw_kernel<true, true> : adamw_kernel<true, false>)
      : (masters ? adamw_kernel<false, true> : adamw_kernel<false, false>);
  launch(
      on,
      kernel,
      {blocks_for(on, kernel, prepared.plan.n_chunks)},
      prepared.plan,
      AdamwState{
          data_of(given.moments[adamw::exp_avg]),
          data_of(given.moments[adamw::exp_avg_sq]),
          data_of(given.moments[adamw::max_exp_avg_sq]),
          static_cast<float*>(given.state_steps.mutable_data_ptr()),
          masters ? static_cast<float*>(data_of(*given.master_param)) : nullptr},
      AdamwDecision{
          given.grad_coef.const_data_ptr<double>(),
          given.grad_coef.dim() == 0 ? 0 : static_cast<int32_t>(given.grad_coef.stride(0)),
          given.verdict.const_data_ptr<int64_t>()},
      given.options);
  stand_ins.copy_back();
}

void adamw_boxed(StableIValue* stack, uint64_t, uint64_t) { step(adamw::Arguments(stack)); }

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, FASTGUARD_CUDA_KEY, m) {
  m.impl("adamw_", &fastguard::adamw_boxed);
}
