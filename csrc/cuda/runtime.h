// The launchers' interface to the machine. This is the only file of the host's side that differs
// between a GPU and tests/simt, which runs the same launchers on tensors of the CPU. Beside it the
// launchers use only these functions of CUDA: cudaStreamIsCapturing, cudaLaunchKernelEx,
// cudaOccupancyMaxActiveBlocksPerMultiprocessor, cudaDeviceGetAttribute, cudaFuncSetAttribute and
// cudaGetErrorString. They use torch's CUDA only as declared here.
#pragma once

#ifdef FASTGUARD_SIMT
#include "simt/launchers/runtime.h"
#else

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

// The dispatch key of the launchers.
#define FASTGUARD_CUDA_KEY CUDA

namespace fastguard {

// The limits of the plans that are kept. A model has a few plans, one per group of parameters.
constexpr int64_t most_plan_bytes = 64 << 20;
constexpr size_t most_plans = 1024;

using torch::stable::accelerator::DeviceGuard;

// The index of a tensor's CUDA device; -1 if it is on another kind of device.
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
