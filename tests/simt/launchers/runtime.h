// csrc/cuda/runtime.h for g++: the same names, on a GPU that the executor emulates, whose memory is
// the CPU's. Every tensor of the CPU's counts as one on device 0 unless a test says otherwise.
#pragma once

#include "simt/threads.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

#define FASTGUARD_CUDA_KEY CPU
#define FASTGUARD_CUDA_ARCHS "none"
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, const void* kernel, int threads, size_t dynamic_shared);

namespace simt {

// Runs the kernel, or keeps it for a replay if the stream is being captured. Throws Error.
cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);

}  // namespace simt

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  static_assert((0 + ... + sizeof(Parameters)) <= 32764, "CUDA takes no more");
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  return simt::launch(
      *config, reinterpret_cast<const void*>(kernel), [=] { std::apply(kernel, parameters); });
}

namespace fastguard {

constexpr int64_t most_plan_bytes = 64 << 10;
constexpr size_t most_plans = 64;

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

int cuda_device_of(AtenTensorHandle tensor);
cudaStream_t current_stream(int device);

}  // namespace fastguard
