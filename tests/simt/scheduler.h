// Which thread runs next.
#pragma once

#include "simt/threads.h"

#include <random>

namespace simt {

class Scheduler {
 public:
  Scheduler(const Options& options, std::vector<Warp*> warps);

  Thread* next();  // null if no thread can run

  // Whether `running` is put aside although it could go on.
  bool interrupts(Thread& running);

 private:
  Warp* first_runnable(size_t from) const;
  Thread* round_robin();
  Thread* greedy();
  Thread* random();
  Thread* unfair();

  Schedule schedule_;
  std::vector<Warp*> warps_;
  std::mt19937_64 random_;
  unsigned first_lane_;
  size_t at_;  // round robin: the place of the warp whose turn it is,
  uint32_t turn_ = 0;  // and its lanes that have not had theirs
  Warp* current_ = nullptr;
  std::vector<Thread*> aside_;  // unfair: until nobody else can run
};

// The order in which the blocks of a grid start.
std::vector<int64_t> block_order(int64_t blocks, uint64_t seed);

}  // namespace simt
