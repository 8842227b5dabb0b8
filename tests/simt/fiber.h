// Fibers: stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <vector>

namespace simt {

// Saves the caller's registers on its stack and goes on where `to` was saved.
extern "C" void simt_switch(void** save, void* to) noexcept;

class Stacks {
 public:
  static constexpr size_t bytes = 64 * 1024;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  // What simt_switch takes to begin `entry` on stack i. Whatever ran there before is dropped.
  void* begin(size_t i, void (*entry)() noexcept);

 private:
  std::vector<std::byte*> stacks_;
};

}  // namespace simt
