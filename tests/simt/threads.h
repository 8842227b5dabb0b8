// The threads of a launch, their warps and their blocks.
#pragma once

#include "simt/shared_memory.h"
#include "simt/traffic.h"
#include "simt/weak_memory.h"

#include <array>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

struct Warp;
struct Block;

// An asynchronous copy that has not arrived.
struct Copy {
  SharedArray* to;
  int64_t offset;
  const void* from;  // null: zeros
  std::array<std::byte, 16> value;
  Location at;
  Site* site = nullptr;  // of the write
};

struct Copies {
  std::vector<Copy> open;  // not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, in order
};

struct Thread {
  uint16_t id;  // in its block
  unsigned lane;
  uint3 index;
  Warp* warp;
  Block* block;
  size_t stack;
  void* saved = nullptr;  // where simt_switch goes on
  const Site* waits = nullptr;  // at which barrier or collective
  int64_t steps = 0;
  bool after_atomic = false;  // its last call of the machine was one
  Copies copies = {};
};

struct Warp {
  Thread* lanes;  // the first of them
  uint32_t alive = 0;
  uint32_t runnable = 0;

  // The collective at which its lanes meet: what each brings, twice, because a lane may reach the
  // next collective before another has read what this one brought.
  const Site* meeting = nullptr;
  uint32_t arrived = 0;
  int turn = 0;
  static constexpr size_t most_bytes = 24;  // of one lane
  alignas(16) std::byte values[2][32 * most_bytes];

  uint32_t since = 0;  // the clock at its last __syncwarp
  Traffic traffic;
};

struct Block {
  int64_t number;  // in the grid
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int alive = 0;

  const Site* barrier = nullptr;  // at which its threads meet
  int arrived = 0;
  uint32_t since = 0;  // the clock at its last barrier

  SharedMemory shared;
  View view;
};

}  // namespace simt
