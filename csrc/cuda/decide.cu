#include "checks.h"
#include "cuda/decide.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <string>
#include <tuple>

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> decide_cuda(const Tensor& total_norm, double max_norm, double skip_norm) {
  fastguard::check_total_norm(total_norm);
  const torch::stable::accelerator::DeviceGuard guard(total_norm.get_device_index());
  Tensor clip_coef = torch::stable::empty_like(total_norm);
  Tensor verdict = torch::stable::new_empty(
      total_norm, {}, torch::headeronly::ScalarType::Long);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(  // the name that torch 2.11 has too
      aoti_torch_get_current_cuda_stream(total_norm.get_device_index(), &stream));
  fastguard::decide_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
      total_norm.const_data_ptr<double>(),
      max_norm,
      skip_norm,
      clip_coef.mutable_data_ptr<double>(),
      verdict.mutable_data_ptr<int64_t>());
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "decide: ", cudaGetErrorString(error));
  return {clip_coef, verdict};
}

std::string cuda_info() {
  return std::string("archs=") + FASTGUARD_CUDA_ARCHS +
      "\ntoolkit=" + std::to_string(__CUDACC_VER_MAJOR__) + "." +
      std::to_string(__CUDACC_VER_MINOR__) + "." + std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastguard, CUDA, m) {
  m.impl("decide", TORCH_BOX(&decide_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastguard, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&cuda_info));
}
