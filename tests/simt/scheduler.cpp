#include "simt/scheduler.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace simt {

namespace {

// The lowest lane of the mask, counted from lane `first`.
unsigned lane_from(uint32_t mask, unsigned first) {
  return (std::countr_zero(std::rotr(mask, static_cast<int>(first))) + first) % 32;
}

}  // namespace

Scheduler::Scheduler(const Options& options, std::vector<Warp*> warps)
    : schedule_(options.schedule),
      warps_(std::move(warps)),
      random_(options.seed),
      at_(warps_.size() - 1) {  // the first is next
  first_lane_ = options.seed == 0 ? 0 : random_() % 32;
  if (options.seed != 0) {
    std::shuffle(warps_.begin(), warps_.end(), random_);
  }
}

Thread* Scheduler::next() {
  switch (schedule_) {
    case Schedule::round_robin:
      return round_robin();
    case Schedule::greedy:
      return greedy();
    case Schedule::random:
      return random();
    case Schedule::unfair:
      return unfair();
  }
  return nullptr;
}

Warp* Scheduler::first_runnable(size_t from) const {
  for (size_t i = 0; i < warps_.size(); ++i) {
    Warp* warp = warps_[(from + i) % warps_.size()];
    if (warp->runnable != 0) {
      return warp;
    }
  }
  return nullptr;
}

Thread* Scheduler::round_robin() {
  turn_ &= warps_[at_]->runnable;
  for (size_t i = 0; i < warps_.size() && turn_ == 0; ++i) {
    at_ = (at_ + 1) % warps_.size();
    turn_ = warps_[at_]->runnable;
  }
  if (turn_ == 0) {
    return nullptr;
  }
  const unsigned lane = lane_from(turn_, first_lane_);
  turn_ &= ~(1u << lane);
  return &warps_[at_]->lanes[lane];
}

Thread* Scheduler::greedy() {
  if (current_ == nullptr || current_->runnable == 0) {
    current_ = first_runnable(0);
  }
  return current_ == nullptr ? nullptr
                             : &current_->lanes[lane_from(current_->runnable, first_lane_)];
}

Thread* Scheduler::random() {
  const Warp* warp = first_runnable(random_() % warps_.size());
  return warp == nullptr ? nullptr : &warp->lanes[lane_from(warp->runnable, random_() % 32)];
}

Thread* Scheduler::unfair() {
  Thread* thread = random();
  if (thread == nullptr && !aside_.empty()) {
    std::swap(aside_[random_() % aside_.size()], aside_.back());
    thread = aside_.back();
    aside_.pop_back();
    thread->warp->runnable |= 1u << thread->lane;
  }
  return thread;
}

bool Scheduler::interrupts(Thread& running) {
  // After an atomic the other blocks know what this thread had to say: there it is most often late
  // with what it should have done before.
  if (schedule_ == Schedule::unfair && random_() % (running.after_atomic ? 2 : 2048) == 0) {
    running.warp->runnable &= ~(1u << running.lane);
    aside_.push_back(&running);
    return true;
  }
  return schedule_ == Schedule::random && random_() % 4 == 0;
}

std::vector<int64_t> block_order(int64_t blocks, uint64_t seed) {
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (seed != 0) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  }
  return order;
}

}  // namespace simt
