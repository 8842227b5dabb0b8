// Tasks for all threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace fastguard {

// Turns the flushing of denormal numbers off while it lives. torch.set_flush_denormal sets it for
// the calling thread alone, so the result would depend on which thread takes which task.
class KeepDenormals {
#ifdef __SSE2__
 public:
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Calls worker(thread)(i) for i from 0 to n - 1, in one parallel region or by the caller alone.
// A free thread takes the next `batch` tasks, so a slow thread does not delay the others. Nothing
// may throw.
template <class Worker>
void for_each_task(int64_t n, int64_t batch, bool parallel, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto take_tasks = [&](int64_t thread, int64_t) {
    [[maybe_unused]] const KeepDenormals keep;
    const auto& task = worker(thread);
    for (int64_t first = next.fetch_add(batch); first < n; first = next.fetch_add(batch)) {
      for (int64_t i = first; i < std::min(first + batch, n); ++i) {
        task(i);
      }
    }
  };
  if (parallel) {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, take_tasks);
  } else {
    take_tasks(0, 1);
  }
}

}  // namespace fastguard
