// The launchers' stream, plans and launches.
#pragma once

#include "cuda/plan.h"
#include "cuda/runtime.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace fastguard {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastguard: ", what, ": ", cudaGetErrorString(error));
}

// Makes the device of a tensor the current one while it lives, and holds torch's stream there.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor)
      : like(tensor), device(device_of(tensor)), stream(current_stream(device)), guard_(device) {
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
  const cudaStream_t stream;
  bool capturing;

 private:
  static int device_of(const torch::stable::Tensor& tensor) {
    const int device = cuda_device_of(tensor.get());
    STD_TORCH_CHECK(
        device >= 0, "fastguard: of tensors of one call some are on a CUDA device, others are not");
    return device;
  }

  DeviceGuard guard_;
};

// Checks the device of an argument beside the lists of tensors.
inline void check_on(
    const Stream& on,
    const std::optional<torch::stable::Tensor>& tensor,
    const char* op,
    const char* name) {
  STD_TORCH_CHECK(
      !tensor.has_value() || cuda_device_of(tensor->get()) == on.device,
      op,
      ": ",
      name,
      " is not on cuda:",
      on.device,
      " as the others are");
}

struct Grid {
  int blocks;
  int dynamic_shared = 0;
  bool cooperative = false;
  int block_threads = threads;
};

constexpr int shared_without_asking = 48 << 10;

// All kernels are launched by this function.
template <class... Parameters, class... Arguments>
void launch(
    const Stream& on, void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  if (grid.dynamic_shared > shared_without_asking) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            grid.dynamic_shared),
        "a kernel asks for more shared memory than the device has");
  }
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.block_threads);
  config.dynamicSmemBytes = grid.dynamic_shared;
  config.stream = on.stream;
  config.attrs = &cooperative;
  config.numAttrs = grid.cooperative;
  check_cuda(
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
      "launching a kernel");
}

// The number of blocks: as many as the device holds at a time, and at most `work`.
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

// A plan in the device's memory, and the tensor that owns the memory.
struct DevicePlan {
  Plan plan;
  torch::stable::Tensor memory;
};

// Plans are kept for later calls. If the tensors are at the same addresses, a call compares 32
// bytes per tensor and uses the plan again. A plan belongs to a stream: the order of the stream
// makes sure that it is written before it is read. A captured graph builds its own plan in its own
// memory, because its kernels read the plan as long as the graph lives.
DevicePlan plan_of(const Stream& on, const std::vector<Given>& tensors);

}  // namespace fastguard
