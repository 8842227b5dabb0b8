// One launch: runs the threads of a grid, and is the machine that they call.
#pragma once

#include "simt/fiber.h"
#include "simt/global_memory.h"
#include "simt/scheduler.h"
#include "simt/sites.h"

#include <functional>
#include <optional>
#include <span>

namespace simt {

// What outlives a launch; simt::Machine owns it.
struct State {
  explicit State(Options options) : options(std::move(options)), sites(this->options.removed) {}

  Options options;
  Memory memory;
  Sites sites;
  Stacks stacks;
};

struct Shape {
  dim3 grid, block;
  size_t dynamic_shared;
  bool cooperative;
};

// The order in which an mma adds: term k is the product of depth k, and the one after the last
// product is what was there before. A real one's is unknown, but always the same.
using MmaOrder = std::array<int, 17>;
MmaOrder drawn_mma_order(uint64_t seed);

class Launch {
 public:
  Launch(State& state, std::string kernel, const Shape& shape, std::function<void()> body);

  void run();  // throws Error

  // --- what the running thread calls; `at` is the place in the kernel ----------------------------

  void load(void* value, const void* address, size_t bytes, const Location& at);
  void store(void* address, const void* value, size_t bytes, const Location& at);
  // The caller then reads and writes the memory itself: no other thread comes between.
  void atomic(void* address, size_t bytes, const Location& at);

  // Kind: shared_load, shared_store or shared_atomic. The bytes, once the access is allowed.
  std::byte* shared(
      SharedArray& array, int64_t offset, size_t bytes, Kind kind, const Location& at);
  SharedArray& dynamic_shared();

  // 16 bytes, zeros if not `valid`, which arrive when the thread waits.
  void copy_async(
      SharedArray& to, int64_t offset, const void* from, bool valid, const Location& at);
  void commit_async();
  void wait_async(size_t groups, const Location& at);  // until no more than these are on their way

  // Lane 8 i + r brings the address of row r of matrix i of `count`.
  void ldmatrix(
      uint32_t* to,
      int count,
      bool transposed,
      SharedArray& array,
      int64_t offset,
      const Location& at);

  void barrier(const Location& at);
  void grid_sync(const Location& at);
  void syncwarp(uint32_t mask, const Location& at);
  // What the 32 lanes bring to a collective.
  template <class T>
  const T* exchange(uint32_t mask, const T& value, Kind kind, const Location& at) {
    static_assert(sizeof(T) <= Warp::most_bytes && std::is_trivially_copyable_v<T>);
    return reinterpret_cast<const T*>(
        meet(step(kind, 0, at), mask, std::as_bytes(std::span(&value, 1))));
  }
  void fence(const Location& at);
  bool within(int64_t i, int64_t n, const Location& at);

  [[noreturn]] void fail(const char* kind, const std::string& where, const std::string& text);

  uint64_t seed() const { return options_.seed; }
  const MmaOrder& mma_order() const { return mma_order_; }

  Sites& sites;
  uint32_t clock = 0;  // moved on by every barrier and every __syncwarp

 private:
  static void run_thread() noexcept;

  void begin(Block& block);
  void end(Block& block);
  void end_thread();
  void resume(Thread& thread);
  void leave();  // the running thread, for the scheduler
  void wait(const Site& site);
  void release(Block& block);
  const std::byte* meet(Site& site, uint32_t mask, std::span<const std::byte> value);
  Site& step(Kind kind, size_t bytes, const Location& at);
  void count(Site& site, const void* address);
  void read(void* value, const void* address, size_t bytes) const;
  void arrive(const Copy& copy);
  void check_no_copies();
  [[noreturn]] void dead_lock();
  Error error_at(
      const char* kind,
      const Thread& thread,
      const std::string& where,
      const std::string& text) const;

  State& state_;
  const Options& options_;
  std::string kernel_;
  Shape shape_;
  std::function<void()> body_;
  MmaOrder mma_order_;
  std::vector<int64_t> order_;  // of the blocks
  size_t started_ = 0;
  int64_t alive_ = 0;  // threads of the blocks that run
  int64_t arrived_ = 0;  // at grid_sync
  std::deque<Block> blocks_;  // those that run
  std::optional<Scheduler> scheduler_;
  std::vector<View> ended_;  // what blocks have stored and not fenced before they ended
  WeakMemory weak_;
  Stored stored_;
  std::optional<Error> error_;
  void* saved_ = nullptr;  // where run() goes on
};

inline Launch* launching = nullptr;
inline Thread* running = nullptr;

}  // namespace simt

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
