// Builds plans on the device, and keeps them for the next call.
#include "cuda/build_plan.cuh"

#include "cuda/launch.h"

#include <list>

namespace fastguard {
namespace {

struct Kept {
  int device;
  cudaStream_t stream;
  HostPlan host;
  DevicePlan plan;
};

DevicePlan build_plan(const Stream& on, const HostPlan& host) {
  torch::stable::Tensor memory = on.empty({host.bytes()}, torch::headeronly::ScalarType::Byte);
  const Plan plan = host.at(memory.mutable_data_ptr());
  auto* const to = static_cast<Word16*>(memory.mutable_data_ptr());
  for (size_t begin = 0; begin < host.words.size(); begin += upload_words) {
    const int n = static_cast<int>(std::min<size_t>(upload_words, host.words.size() - begin));
    UploadPart part;
    std::copy_n(&host.words[begin], n, part.words);
    launch(on, upload_kernel, {(n + threads - 1) / threads}, part, to + begin, n);
  }
  launch(on, expand_plan_kernel, {plan.tensors + 1}, plan);
  return {plan, memory};
}

// Drops the oldest plans. The newest one stays even if it alone is too large. Tensors at new
// addresses leave a plan behind in each step, and every call compares all plans that are kept.
void forget_oldest(std::list<Kept>& kept) {
  int64_t bytes = 0;
  for (const Kept& each : kept) {
    bytes += each.host.bytes();
  }
  while (kept.size() > 1 && (bytes > most_plan_bytes || kept.size() > most_plans)) {
    bytes -= kept.back().host.bytes();
    kept.pop_back();
  }
}

}  // namespace

DevicePlan plan_of(const Stream& on, const std::vector<Given>& tensors) {
  static std::mutex mutex;
  static auto* const kept = new std::list<Kept>;  // not destroyed: torch's allocator ends before
  HostPlan host(tensors);
  STD_TORCH_CHECK(host.fits, "fastguard: more than 3.4e10 elements in one call");
  if (on.capturing) {
    return build_plan(on, host);
  }
  const std::lock_guard lock(mutex);
  for (auto each = kept->begin(); each != kept->end(); ++each) {
    if (each->device == on.device && each->stream == on.stream && each->host == host) {
      kept->splice(kept->begin(), *kept, each);
      return kept->front().plan;
    }
  }
  kept->push_front({on.device, on.stream, host, build_plan(on, host)});
  forget_oldest(*kept);
  return kept->front().plan;
}

}  // namespace fastguard
