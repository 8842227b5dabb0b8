#include "simt/weak_memory.h"

namespace simt {

namespace {

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

uint8_t& byte(uintptr_t address) { return *reinterpret_cast<uint8_t*>(address); }

}  // namespace

void WeakMemory::load(const View& view, const void* address, void* value, size_t bytes) const {
  for (size_t i = 0; i < bytes; ++i) {
    const uintptr_t at = number(address) + i;
    uint8_t& seen = static_cast<uint8_t*>(value)[i];
    if (const auto own = view.stored.find(at); own != view.stored.end()) {
      seen = own->second;
      continue;
    }
    seen = byte(at);
    const auto changes = changes_.find(at);
    if (changes == changes_.end()) {
      continue;
    }
    // Back to what the block's last fence let it see, or to what it has changed itself since.
    for (auto last = changes->second.rbegin(); last != changes->second.rend(); ++last) {
      if (last->number < view.seen || last->block == view.block) {
        break;
      }
      seen = last->before;
    }
  }
}

void WeakMemory::store(View& view, void* address, const void* value, size_t bytes) const {
  for (size_t i = 0; i < bytes; ++i) {
    view.stored[number(address) + i] = static_cast<const uint8_t*>(value)[i];
  }
}

void WeakMemory::publish(const View& view, uintptr_t address, uint8_t value) {
  changes_[address].push_back({count_++, view.block, byte(address)});
  byte(address) = value;
}

void WeakMemory::atomic(View& view, void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    const uintptr_t at = number(address) + i;
    const auto own = view.stored.find(at);
    publish(view, at, own == view.stored.end() ? byte(at) : own->second);
    view.stored.erase(at);
  }
  view.known = count_;
}

void WeakMemory::fence(View& view) {
  for (const auto& [address, value] : view.stored) {
    publish(view, address, value);
  }
  view.stored.clear();
  view.seen = view.known;
}

void WeakMemory::see_all(View& view) const { view.seen = view.known = count_; }

}  // namespace simt
