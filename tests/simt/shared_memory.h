// Shared memory: exact bounds, poison, and a shadow of every byte that finds races.
#pragma once

#include "simt/report.h"

#include <cstddef>
#include <deque>

namespace simt {

struct Thread;

// The last accesses to one byte. A stamp is the launch's clock, which every barrier and every
// __syncwarp moves on, so two stamps tell whether one of these lay between two accesses.
struct Shadow {
  uint32_t written_at = 0, read_at = 0;
  uint16_t writer = 0, reader = 0;  // threads, or what else shared_memory.cpp lists
  uint16_t write_site = 0, read_site = 0;
};

// An asynchronous copy is issued, and then nobody may touch its bytes until it arrives.
enum class Access { read, write, atomic, issue, arrive };

struct SharedArray {
  const void* key;  // of its declaration
  std::string name;
  size_t first_byte;  // in the block's shared memory: its bank, and its alignment
  std::vector<std::byte> bytes;
  std::vector<Shadow> shadow;

  // Fails unless `count` bytes at `offset` exist and can be moved by one instruction.
  void check(int64_t offset, size_t count, const Location& at) const;

  // Fails if another thread's access to these bytes is not ordered with this one.
  void track(
      int64_t offset,
      size_t count,
      Access access,
      const Thread& thread,
      const Site& site,
      const Location& at);

  void poison(int64_t offset, size_t count);  // with NaN
};

// The shared memory of one block.
class SharedMemory {
 public:
  // The array that `key` declares, made when it is first met.
  SharedArray& array(const void* key, const char* name, size_t bytes);

  // What the block before left is not what the next one finds.
  void poison();

 private:
  std::deque<SharedArray> arrays_;  // a deque: addresses stay
  size_t bytes_ = 0;
};

// Passes over the 32 banks of 4 bytes that a request takes: the lanes of `addresses`, each of
// `bytes` bytes. 8-byte requests go by half warps and 16-byte ones by quarter warps.
struct Wavefronts {
  uint64_t taken, needed;
};
Wavefronts wavefronts(uint32_t lanes, const uint64_t (&addresses)[32], unsigned bytes);

}  // namespace simt
