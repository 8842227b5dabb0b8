// What a launch is asked for, what it tells, and how it fails.
#pragma once

#include <cstdint>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

using Location = std::source_location;

enum class Schedule {
  round_robin,  // every warp in turn, each of its lanes up to the next wait
  greedy,  // one warp for as long as a lane of it can run
  random,  // any lane of any warp, which may also be put aside between two waits
  unfair,  // the same, but who is put aside stays there until nobody else can run
};

struct Options {
  Schedule schedule = Schedule::round_robin;
  uint64_t seed = 0;  // 0: blocks, warps and lanes in ascending order where order is free
  int resident = 4;  // blocks that run at a time; all of them in a cooperative launch
  bool weak_memory = false;  // blocks see each other's stores only as fences order them
  bool block_races = false;  // two blocks that store different values at one address are an error
  bool count = false;  // requests, sectors and wavefronts; calls and bytes always are
  int64_t step_limit = int64_t{1} << 20;  // calls of this machine that one thread may make
  // Barriers, fences and waits (see Site::where) that do nothing, and bounds that always hold.
  std::set<std::string> removed;
};

enum class Kind : uint8_t {
  load,
  store,
  atomic,
  copy_async,
  shared_load,
  shared_store,
  shared_atomic,
  ldmatrix,
  barrier,
  grid_sync,
  syncwarp,
  collective,
  mma,
  fence,
  wait,
  within,
};

const char* name_of(Kind);

// One place in a kernel where it calls the machine.
struct Site {
  Kind kind;
  unsigned bytes;  // that one call moves
  std::string where;  // file:line:column
  bool removed;
  int index;
  uint64_t calls = 0;  // by single threads
  uint64_t requests = 0;  // by whole warps, what a GPU issues at a time; meetings at a barrier
  uint64_t sectors = 0;  // of 32 bytes of global memory, summed over the requests
  uint64_t wavefronts = 0;  // passes over the banks of shared memory, summed over the requests
  uint64_t conflicts = 0;  // those of the wavefronts that another layout would save
};

// One launch, and the sectors of 32 bytes that it touched at all: what has to come from and go to
// memory if the caches are empty before and large enough.
struct Launched {
  std::string kernel;
  int64_t loaded_sectors = 0;
  int64_t stored_sectors = 0;
};

struct Report {
  std::vector<Launched> launches;
  std::vector<Site> sites;  // in the order in which they were met first
};

// The first error of a launch; it ends the launch.
struct Error : std::runtime_error {
  std::string kind, kernel, block, thread, where;

  Error(
      std::string kind,
      std::string kernel,
      std::string block,
      std::string thread,
      std::string where,
      const std::string& text);
};

std::string text_of(const Location&);

// Ends the launch in which the calling thread runs.
[[noreturn]] void fail(const char* kind, const Location&, const std::string& text);

}  // namespace simt
