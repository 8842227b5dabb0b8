// The machine as the launchers see it: the only file of the host's side that differs between a GPU
// and tests/simt, where the same launchers run on tensors of the CPU. Of CUDA's runtime they use
// cudaStreamIsCapturing, cudaLaunchKernelEx, cudaOccupancyMaxActiveBlocksPerMultiprocessor,
// cudaDeviceGetAttribute, cudaFuncSetAttribute and cudaGetErrorString; of torch's CUDA only what is
// declared here.
#pragma once

#ifdef FASTGUARD_SIMT
#include "simt/launchers/runtime.h"
#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

// The dispatch key under which the launchers are found.
#define FASTGUARD_CUDA_KEY CUDA

namespace fastguard {

// What is kept of plans for later calls. A model has a handful, one for each group of parameters.
constexpr int64_t most_plan_bytes = 64 << 20;
constexpr size_t most_plans = 1024;

using torch::stable::accelerator::DeviceGuard;

// The CUDA device that a tensor is on, -1 if it is elsewhere.
inline int cuda_device_of(AtenTensorHandle tensor) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return type == aoti_torch_device_type_cuda() ? index : -1;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(  // the name that torch 2.11 has too
      aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fastguard

#endif
