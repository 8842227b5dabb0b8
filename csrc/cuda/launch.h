// How a launcher comes to its stream, its plan and its kernel.
#pragma once

#include "cuda/plan.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

namespace fastguard {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastguard: ", what, ": ", cudaGetErrorString(error));
}

// The device of a tensor, current while this lives, and torch's stream there.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor)
      : like(tensor), device(tensor.get_device_index()), guard_(device) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(  // the name that torch 2.11 has too
        aoti_torch_get_current_cuda_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
    cudaStreamCaptureStatus status;
    check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    capturing = status != cudaStreamCaptureStatusNone;
  }

  torch::stable::Tensor empty(
      std::vector<int64_t> shape, torch::headeronly::ScalarType dtype) const {
    return torch::stable::new_empty(like, shape, dtype);
  }

  const torch::stable::Tensor like;
  const int device;
  cudaStream_t stream;
  bool capturing;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

struct Grid {
  int blocks;
  int dynamic_shared = 0;
  bool cooperative = false;
};

// The one place from which kernels are launched.
template <class... Parameters, class... Arguments>
void launch(
    const Stream& on, void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  auto pointers = std::apply([](auto&... each) { return std::array{(void*)(&each)...}; }, parameters);
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = grid.dynamic_shared;
  config.stream = on.stream;
  config.attrs = &cooperative;
  config.numAttrs = grid.cooperative;
  check_cuda(
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers.data()),
      "launching a kernel");
}

// As many blocks as the device holds at a time, and no more than there is work for.
template <class... Parameters>
int blocks_for(
    const Stream& on, void (*kernel)(Parameters...), int64_t work, int dynamic_shared = 0) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> known;
  const auto* function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard lock(mutex);
  int64_t& most = known[{on.device, function}];
  if (most == 0) {
    int per_sm = 0, sms = 0;
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, function, threads, dynamic_shared),
        "a kernel does not fit the device");
    check_cuda(
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, on.device),
        "cudaDeviceGetAttribute");
    STD_TORCH_CHECK(per_sm > 0, "fastguard: no block of a kernel fits on an SM of this device");
    most = int64_t{per_sm} * sms;
  }
  return static_cast<int>(std::clamp<int64_t>(work, 1, most));
}

// A plan in the device's memory, and what keeps it there.
struct DevicePlan {
  Plan plan;
  torch::stable::Tensor memory;
};

// Plans of earlier calls are kept: one whose tensors are still where they were costs a comparison of
// 32 bytes a tensor. Each belongs to a stream: what is written there first is there for what comes
// later. A graph that is being captured builds its own in its own memory, for a captured kernel reads
// its plan as long as the graph lives.
DevicePlan plan_of(const Stream& on, const std::vector<Given>& tensors);

}  // namespace fastguard
