#include "simt/launchers/runtime.h"

#include "simt/launchers/allocations.h"
#include "simt/machine.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string_view>
#include <utility>

namespace simt {

namespace {

// Two SMs with room for two blocks each: every launch of some size has blocks with several chunks.
constexpr int sms = 2;
constexpr int blocks_per_sm = 2;
constexpr size_t most_shared = 48 << 10;  // unless cudaFuncSetAttribute has asked for more
constexpr int most_to_ask_for = 99
    << 10;  // of a block on sm_86, sm_89 and sm_120, which have least

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(const_cast<void*>(kernel), &info) == 0 || info.dli_saddr != kernel) {
    throw std::logic_error("simt: a kernel without a name; is it hidden?");
  }
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr), std::free);
  // `void fastguard::kernel<fastguard::BFloat16, 64>(...)`, of which remains kernel<BFloat16,64>
  std::string name = text.get();
  name = name.substr(0, name.find('('));
  name = name.substr(name.find("fastguard::"));
  for (const std::string_view drop : {"fastguard::", " "}) {
    for (size_t at; (at = name.find(drop)) != std::string::npos;) {
      name.erase(at, drop.size());
    }
  }
  return name;
}

struct Captured {
  cudaLaunchConfig_t config;
  bool cooperative;
  std::string name;
  std::function<void()> body;
};

class Gpu {
 public:
  Gpu() { follow_allocations(); }

  cudaError_t launch(
      const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
    const std::lock_guard lock(mutex_);
    const bool cooperative = config.numAttrs > 0 && config.attrs[0].val.cooperative;
    const int64_t blocks = int64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
    const auto asked = asked_for_.find(kernel);
    const size_t most = asked == asked_for_.end() ? most_shared : asked->second;
    if (blocks == 0 || config.gridDim.x > INT32_MAX || config.dynamicSmemBytes > most) {
      return cudaErrorInvalidConfiguration;
    }
    if (cooperative && blocks > sms * blocks_per_sm) {
      return cudaErrorCooperativeLaunchTooLarge;
    }
    if (device_of(config.stream) != device) {
      return cudaErrorInvalidResourceHandle;
    }
    Captured launched{config, cooperative, name_of(kernel), std::move(body)};
    if (capturing) {
      graph_.push_back(std::move(launched));
    } else {
      run(launched);
    }
    return cudaSuccess;
  }

  cudaError_t ask_for_shared(const void* kernel, int bytes) {
    const std::lock_guard lock(mutex_);
    if (bytes > most_to_ask_for) {
      return cudaErrorInvalidValue;
    }
    asked_for_[kernel] = bytes;
    return cudaSuccess;
  }

  void choose(const Options& options) {
    const std::lock_guard lock(mutex_);
    options_ = options;
    machine_.reset();
  }

  void capture(bool on) {
    const std::lock_guard lock(mutex_);
    capturing = on;
    keep_freed(on);
  }

  void replay() {
    const std::lock_guard lock(mutex_);
    for (const Captured& each : graph_) {
      run(each);
    }
  }

  void forget_graph() {
    const std::lock_guard lock(mutex_);
    graph_.clear();
    let_go();
  }

  // What ran since the last call, a line for each.
  std::string launches() {
    const std::lock_guard lock(mutex_);
    return std::exchange(launches_, {});
  }

  static int device_of(cudaStream_t stream) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(stream) >> 32);
  }
  cudaStream_t stream_of(int device) const {
    return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(device) << 32 | stream);
  }

  static thread_local int device;
  static thread_local int stream;
  std::map<const void*, int> elsewhere;  // on which device the tensors with this memory are
  bool capturing = false;

 private:
  void run(const Captured& launched) {
    std::ostringstream line;
    line << launched.name << ' ' << launched.config.gridDim.x << ' '
         << device_of(launched.config.stream) << ' '
         << static_cast<unsigned>(reinterpret_cast<uintptr_t>(launched.config.stream)) << '\n';
    launches_ += line.str();
    if (!machine_) {
      machine_ = std::make_unique<Machine>(options_);
    }
    machine_->memory = allocations();
    const auto& [config, cooperative, name, body] = launched;
    machine_->launch(
        name,
        config.gridDim,
        config.blockDim,
        config.dynamicSmemBytes,
        cooperative,
        +[](const std::function<void()>* run) { (*run)(); },
        &body);
  }

  std::mutex mutex_;
  std::map<const void*, size_t> asked_for_;
  Options options_;
  std::unique_ptr<Machine> machine_;
  std::vector<Captured> graph_;
  std::string launches_;
};

thread_local int Gpu::device = 0;
thread_local int Gpu::stream = 0;

Gpu& gpu() {
  static auto* const gpu = new Gpu;
  return *gpu;
}

const bool awake = (gpu(), true);  // the allocations are followed from the beginning

}  // namespace

cudaError_t launch(
    const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  return gpu().launch(config, kernel, std::move(body));
}

}  // namespace simt

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    default:
      return "too many blocks in cooperative launch";
  }
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = simt::gpu().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::sms;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return simt::gpu().ask_for_shared(kernel, value);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = simt::blocks_per_sm;
  return cudaSuccess;
}

namespace fastguard {

DeviceGuard::DeviceGuard(int device) : before_(std::exchange(simt::Gpu::device, device)) {}
DeviceGuard::~DeviceGuard() { simt::Gpu::device = before_; }

int cuda_device_of(AtenTensorHandle tensor) {
  const void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
  const auto found = simt::gpu().elsewhere.find(data);
  return found == simt::gpu().elsewhere.end() ? 0 : found->second;
}

cudaStream_t current_stream(int device) { return simt::gpu().stream_of(device); }

}  // namespace fastguard

// For ctypes.
extern "C" {

// Schedule: the number of simt::Schedule. Vary the seed and all orders vary.
void simt_options(int schedule, uint64_t seed, int weak_memory) {
  simt::Options options;
  options.schedule = static_cast<simt::Schedule>(schedule);
  options.seed = seed;
  options.weak_memory = weak_memory != 0;
  simt::gpu().choose(options);
}

const char* simt_launches() {
  static thread_local std::string text;
  text = simt::gpu().launches();
  return text.c_str();
}

void simt_stream(int stream) { simt::Gpu::stream = stream; }
void simt_place(const void* data, int device) { simt::gpu().elsewhere[data] = device; }
void simt_place_all_back() { simt::gpu().elsewhere.clear(); }
void simt_capture(int on) { simt::gpu().capture(on != 0); }

// Null, or what went wrong.
const char* simt_replay() {
  static thread_local std::string error;
  try {
    simt::gpu().replay();
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}
void simt_let_go() { simt::let_go(); }
void simt_forget_graph() { simt::gpu().forget_graph(); }
}
