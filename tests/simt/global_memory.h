// Global memory: what a launch may touch, and which blocks store what.
#pragma once

#include "simt/report.h"

#include <cstddef>
#include <unordered_map>

namespace simt {

class Memory {
 public:
  // What a launch may read, and write if `writable`. The ranges of two calls must not overlap.
  void allow(const void* pointer, size_t bytes, std::string name, bool writable);

  // Counts the sector of an access that is allowed, unless it was counted since forget_sectors().
  void touch(const void* address, bool write);
  int64_t loaded_sectors() const { return touched_[0]; }
  int64_t stored_sectors() const { return touched_[1]; }
  void forget_sectors();

  // Fails unless `bytes` bytes at `address` may be accessed with one instruction.
  void check(const void* address, size_t bytes, bool write, const Location& at) const;

 private:
  struct Range {
    uintptr_t begin, end;
    std::string name;
    bool writable;
    std::vector<bool> sectors[2] = {};  // that were loaded, and stored
  };

  const Range* find(uintptr_t address) const;

  std::vector<Range> ranges_;  // ascending
  int64_t touched_[2] = {0, 0};
  mutable const Range* last_ = nullptr;  // most accesses are near the one before them
};

// Which block stored each byte in this launch, and what.
class Stored {
 public:
  // The block other than `block` that stored something else in this range, or -1.
  int64_t conflict(const void* address, const void* value, size_t bytes, int64_t block);

 private:
  struct Byte {
    int64_t block;
    uint8_t value;
  };
  std::unordered_map<uintptr_t, Byte> bytes_;
};

}  // namespace simt
