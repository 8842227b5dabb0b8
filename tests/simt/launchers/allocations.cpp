#include "simt/launchers/allocations.h"

#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace simt {

namespace {

constexpr int nothing = 0xff;  // NaN in every format

class Follower final : public c10::Allocator {
 public:
  explicit Follower(c10::Allocator* below) : below_(below) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* const memory = below_->raw_allocate(bytes);
    if (memory != nullptr) {
      std::memset(memory, nothing, bytes);
      const std::lock_guard lock(mutex_);
      live_[memory] = bytes;
    }
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  Memory live() {
    const std::lock_guard lock(mutex_);
    Memory memory;
    for (const auto& [address, bytes] : live_) {
      memory.allow(address, bytes, "a tensor's " + std::to_string(bytes) + " bytes", true);
    }
    return memory;
  }

  void keep(bool keep) {
    const std::lock_guard lock(mutex_);
    keep_ = keep;
  }

  void let_go() {
    std::unique_lock lock(mutex_);
    const auto kept = std::exchange(kept_, {});
    lock.unlock();
    for (void* memory : kept) {
      free(memory);
    }
  }

 private:
  static void release(void* memory);

  void free(void* memory) {
    if (memory == nullptr) {
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      if (keep_) {
        kept_.push_back(memory);
        return;
      }
      const auto found = live_.find(memory);
      std::memset(memory, nothing, found->second);
      live_.erase(found);
    }
    below_->raw_deallocate(memory);
  }

  c10::Allocator* const below_;
  std::mutex mutex_;
  std::map<void*, size_t> live_;
  std::vector<void*> kept_;
  bool keep_ = false;
};

Follower& follower() {
  static auto* const follower = new Follower(c10::GetCPUAllocator());  // never destroyed
  return *follower;
}

void Follower::release(void* memory) { follower().free(memory); }

}  // namespace

void follow_allocations() { c10::SetAllocator(c10::DeviceType::CPU, &follower(), 255); }
Memory allocations() { return follower().live(); }
void keep_freed(bool keep) { follower().keep(keep); }
void let_go() { follower().let_go(); }

}  // namespace simt
