// Global memory as a GPU may show it. A block sees its own stores at once, and those of the others
// only so far as two fences order them: the other block's after the store, and its own after the
// atomic by which it can know of that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace simt {

// What sets one block apart from the others.
struct View {
  explicit View(int64_t block = 0) : block(block) {}

  int64_t block;
  uint32_t known = 0;  // how many changes came before its last atomic
  uint32_t seen = 0;  // and before the one before its last fence: these it sees
  std::unordered_map<uintptr_t, uint8_t> stored;  // that no other block can see yet, by address
};

class WeakMemory {
 public:
  void load(const View& view, const void* address, void* value, size_t bytes) const;
  void store(View& view, void* address, const void* value, size_t bytes) const;
  void atomic(View& view, void* address, size_t bytes);  // changes memory itself, by the caller
  void fence(View& view);
  void see_all(View& view) const;

 private:
  struct Change {
    uint32_t number;
    int64_t block;
    uint8_t before;
  };

  void publish(const View& view, uintptr_t address, uint8_t value);

  std::unordered_map<uintptr_t, std::vector<Change>> changes_;  // of each byte, in order
  uint32_t count_ = 0;
};

}  // namespace simt
