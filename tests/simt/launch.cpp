#include "simt/launch.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace simt {

namespace {

int64_t volume(const dim3& size) { return int64_t{size.x} * size.y * size.z; }

uint3 place(int64_t number, const dim3& size) {
  return {
      static_cast<unsigned>(number % size.x),
      static_cast<unsigned>(number / size.x % size.y),
      static_cast<unsigned>(number / size.x / size.y)};
}

std::string text_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
      std::to_string(index.z) + ")";
}

// One launch at a time, and none left behind when one ends by an error.
struct Launching {
  explicit Launching(Launch* launch) { launching = launch; }
  ~Launching() {
    launching = nullptr;
    running = nullptr;
  }
};

}  // namespace

void fail(const char* kind, const Location& at, const std::string& text) {
  launching->fail(kind, text_of(at), text);
}

// --- a grid's way --------------------------------------------------------------------------------

Launch::Launch(State& state, std::string kernel, const Shape& shape, std::function<void()> body)
    : sites(state.sites),
      state_(state),
      options_(state.options),
      kernel_(std::move(kernel)),
      shape_(shape),
      body_(std::move(body)),
      mma_order_(drawn_mma_order(options_.seed)) {
  const int64_t blocks = volume(shape.grid);
  const int64_t threads = volume(shape.block);
  if (blocks < 1 || threads < 1 || threads > 1024) {
    throw std::invalid_argument(
        "simt: " + kernel_ + " is launched with " + std::to_string(blocks) + " blocks of " +
        std::to_string(threads) + " threads");
  }
  order_ = block_order(blocks, options_.seed);
  blocks_.resize(shape.cooperative ? blocks : std::min<int64_t>(blocks, options_.resident));
  std::vector<Warp*> warps;
  for (size_t slot = 0; slot < blocks_.size(); ++slot) {
    Block& block = blocks_[slot];
    block.threads.resize(threads);
    block.warps.resize((threads + 31) / 32);
    for (int64_t id = 0; id < threads; ++id) {
      block.threads[id] = {
          .id = static_cast<uint16_t>(id),
          .lane = static_cast<unsigned>(id % 32),
          .index = place(id, shape.block),
          .warp = &block.warps[id / 32],
          .block = &block,
          .stack = slot * threads + id};
    }
    for (size_t i = 0; i < block.warps.size(); ++i) {
      block.warps[i].lanes = &block.threads[i * 32];
      warps.push_back(&block.warps[i]);
    }
  }
  scheduler_.emplace(options_, std::move(warps));
}

void Launch::run() {
  const Launching guard(this);
  gridDim = shape_.grid;
  blockDim = shape_.block;
  for (Block& block : blocks_) {
    begin(block);
  }
  while (Thread* thread = scheduler_->next()) {
    resume(*thread);
    if (error_) {
      throw *error_;
    }
    if (thread->block->alive == 0) {
      end(*thread->block);
    }
  }
  if (alive_ > 0) {
    dead_lock();
  }
  for (View& view : ended_) {
    weak_.fence(view);
  }
}

void Launch::begin(Block& block) {
  block.number = order_[started_++];
  block.index = place(block.number, shape_.grid);
  block.view = View(block.number);
  block.alive = static_cast<int>(block.threads.size());
  block.since = ++clock;
  block.shared.poison();
  for (Thread& thread : block.threads) {
    thread.steps = 0;
    thread.copies = {};
    thread.saved = state_.stacks.begin(thread.stack, run_thread);
    thread.warp->alive |= 1u << thread.lane;
    thread.warp->runnable = thread.warp->alive;
  }
  alive_ += block.alive;
}

void Launch::end(Block& block) {
  for (Warp& warp : block.warps) {
    warp.traffic.settle();
  }
  if (!block.view.stored.empty()) {
    ended_.push_back(std::move(block.view));
  }
  if (started_ < order_.size()) {
    begin(block);
  }
}

void Launch::run_thread() noexcept {
  launching->body_();
  launching->end_thread();
}

void Launch::end_thread() {
  Warp& warp = *running->warp;
  Block& block = *running->block;
  if (warp.arrived != 0) {
    fail(
        "divergent",
        warp.meeting->where,
        "other lanes of the warp wait here for this one, which ends");
  }
  check_no_copies();
  warp.alive &= ~(1u << running->lane);
  warp.runnable &= ~(1u << running->lane);
  --alive_;
  if (--block.alive > 0 && block.arrived == block.alive) {
    release(block);
  }
  leave();
}

void Launch::resume(Thread& thread) {
  running = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  simt_switch(&saved_, thread.saved);
}

void Launch::leave() { simt_switch(&running->saved, saved_); }

Site& Launch::step(Kind kind, size_t bytes, const Location& at) {
  Site& site = sites.meet(kind, static_cast<unsigned>(bytes), at);
  if (++running->steps > options_.step_limit) {
    fail("run_away", site.where, "more than " + std::to_string(options_.step_limit) + " steps");
  }
  if (scheduler_->interrupts(*running)) {
    leave();
  }
  running->after_atomic = kind == Kind::atomic;
  return site;
}

// --- errors --------------------------------------------------------------------------------------

Error Launch::error_at(
    const char* kind,
    const Thread& thread,
    const std::string& where,
    const std::string& text) const {
  return Error(kind, kernel_, text_of(thread.block->index), text_of(thread.index), where, text);
}

void Launch::fail(const char* kind, const std::string& where, const std::string& text) {
  error_ = error_at(kind, *running, where, text);
  leave();
  __builtin_unreachable();  // run() never goes on with a thread after an error
}

void Launch::dead_lock() {
  std::map<std::string, int> waiting;
  const Thread* first = nullptr;
  for (const Block& block : blocks_) {
    for (const Thread& thread : block.threads) {
      if (thread.warp->alive >> thread.lane & 1) {
        first = first == nullptr ? &thread : first;
        ++waiting[std::string(name_of(thread.waits->kind)) + " " + thread.waits->where];
      }
    }
  }
  std::string text = "no thread can go on;";
  for (const auto& [where, threads] : waiting) {
    text += " " + std::to_string(threads) + " at " + where + ";";
  }
  throw error_at("dead_lock", *first, first->waits->where, text);
}

// --- meetings ------------------------------------------------------------------------------------

void Launch::wait(const Site& site) {
  running->waits = &site;
  running->warp->runnable &= ~(1u << running->lane);
  leave();
}

void Launch::release(Block& block) {
  block.arrived = 0;
  block.since = ++clock;
  for (Warp& warp : block.warps) {
    warp.traffic.settle();
    warp.runnable = warp.alive;
  }
}

void Launch::barrier(const Location& at) {
  Site& site = step(Kind::barrier, 0, at);
  if (site.removed) {
    return;
  }
  Block& block = *running->block;
  if (block.arrived > 0 && block.barrier != &site) {
    fail("divergent", site.where, "other threads of the block wait at " + block.barrier->where);
  }
  block.barrier = &site;
  if (++block.arrived < block.alive) {
    wait(site);
  } else {
    ++site.requests;
    release(block);
  }
}

void Launch::grid_sync(const Location& at) {
  Site& site = step(Kind::grid_sync, 0, at);
  if (!shape_.cooperative) {
    fail("not_cooperative", site.where, "grid_sync needs a cooperative launch");
  }
  if (site.removed) {
    return;
  }
  if (++arrived_ < volume(shape_.grid) * volume(shape_.block)) {
    wait(site);
    return;
  }
  ++site.requests;
  arrived_ = 0;
  stored_ = {};
  for (Block& block : blocks_) {
    weak_.fence(block.view);
    release(block);
  }
  for (Block& block : blocks_) {
    weak_.see_all(block.view);
  }
}

const std::byte* Launch::meet(Site& site, uint32_t mask, std::span<const std::byte> value) {
  Warp& warp = *running->warp;
  if (mask != ~0u) {
    fail(
        "partial_mask",
        site.where,
        "the mask is " + std::to_string(mask) + ", not that of a whole warp");
  }
  if (warp.alive != ~0u) {
    fail(
        "divergent",
        site.where,
        std::to_string(32 - __builtin_popcount(warp.alive)) +
            " lanes of the warp have ended or never were");
  }
  if (warp.arrived != 0 && warp.meeting != &site) {
    fail("divergent", site.where, "other lanes of the warp wait at " + warp.meeting->where);
  }
  warp.meeting = &site;
  std::byte* values = warp.values[warp.turn];
  std::copy(value.begin(), value.end(), values + running->lane * value.size());
  warp.arrived |= 1u << running->lane;
  if (warp.arrived != ~0u) {
    wait(site);
    return values;
  }
  ++site.requests;
  warp.arrived = 0;
  warp.turn ^= 1;
  warp.runnable = ~0u;
  warp.traffic.settle();
  // Only __syncwarp orders memory; CUDA says of shuffles and votes that they do not.
  if (site.kind == Kind::syncwarp) {
    warp.since = ++clock;
  }
  return values;
}

void Launch::syncwarp(uint32_t mask, const Location& at) {
  Site& site = step(Kind::syncwarp, 0, at);
  if (!site.removed) {
    meet(site, mask, {});
  }
}

void Launch::fence(const Location& at) {
  if (!step(Kind::fence, 0, at).removed) {
    weak_.fence(running->block->view);
  }
}

void Launch::count(Site& site, const void* address) {
  running->warp->traffic.add(site, running->lane, reinterpret_cast<uintptr_t>(address));
  if (site.kind != Kind::store) {
    state_.memory.touch(address, false);
  }
  if (site.kind == Kind::store || site.kind == Kind::atomic) {
    state_.memory.touch(address, true);
  }
}

bool Launch::within(int64_t i, int64_t n, const Location& at) {
  return step(Kind::within, 0, at).removed || i < n;
}

// --- memory --------------------------------------------------------------------------------------

void Launch::read(void* value, const void* address, size_t bytes) const {
  if (options_.weak_memory) {
    weak_.load(running->block->view, address, value, bytes);
  } else {
    memcpy(value, address, bytes);
  }
}

void Launch::load(void* value, const void* address, size_t bytes, const Location& at) {
  Site& site = step(Kind::load, bytes, at);
  state_.memory.check(address, bytes, false, at);
  read(value, address, bytes);
  if (options_.count) {
    count(site, address);
  }
}

void Launch::store(void* address, const void* value, size_t bytes, const Location& at) {
  Site& site = step(Kind::store, bytes, at);
  state_.memory.check(address, bytes, true, at);
  if (options_.block_races) {
    const int64_t other = stored_.conflict(address, value, bytes, running->block->number);
    if (other >= 0) {
      fail(
          "race",
          site.where,
          "block " + text_of(place(other, shape_.grid)) + " stored another value there");
    }
  }
  if (options_.weak_memory) {
    weak_.store(running->block->view, address, value, bytes);
  } else {
    memcpy(address, value, bytes);
  }
  if (options_.count) {
    count(site, address);
  }
}

void Launch::atomic(void* address, size_t bytes, const Location& at) {
  Site& site = step(Kind::atomic, bytes, at);
  state_.memory.check(address, bytes, true, at);
  if (options_.weak_memory) {
    weak_.atomic(running->block->view, address, bytes);
  }
  if (options_.count) {
    count(site, address);
  }
}

std::byte* Launch::shared(
    SharedArray& array, int64_t offset, size_t bytes, Kind kind, const Location& at) {
  Site& site = step(kind, bytes, at);
  const Access access = kind == Kind::shared_load ? Access::read
      : kind == Kind::shared_store                ? Access::write
                                                  : Access::atomic;
  array.check(offset, bytes, at);
  array.track(offset, bytes, access, *running, site, at);
  if (options_.count) {
    running->warp->traffic.add(site, running->lane, array.first_byte + offset);
  }
  return &array.bytes[offset];
}

SharedArray& Launch::dynamic_shared() {
  static const char key = 0;
  return running->block->shared.array(&key, "dynamic_shared", shape_.dynamic_shared);
}

}  // namespace simt
