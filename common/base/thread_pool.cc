#include "common/base/thread_pool.h"

#include "common/base/check.h"

namespace nibble {
namespace {

// Operators of one step follow each other within microseconds, so a waiting thread first spins; an idle server must not
// burn a core, so it then sleeps in the kernel.
constexpr int kSpins = 4000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns once `value` differs from `old`, and what it is.
template <typename T>
T WaitForChange(const std::atomic<T>& value, T old) {
  for (int i = 0; i < kSpins; ++i) {
    const T now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    Pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  NIBBLE_CHECK_GE(threads, 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::ParallelFor(int64_t items, absl::FunctionRef<void(int64_t item, int thread)> body) {
  if (workers_.empty() || items <= 1) {
    for (int64_t i = 0; i < items; ++i) body(i, 0);
    return;
  }
  body_ = &body;
  items_ = items;
  next_item_.store(0, std::memory_order_relaxed);
  working_.store(static_cast<int32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  RunItems(body, items, 0);
  // Every worker checks out, also one that found no item left: no straggler can take an item of the next round.
  for (int32_t left = working_.load(std::memory_order_acquire); left != 0; left = WaitForChange(working_, left)) {
  }
}

void ThreadPool::RunItems(const Body& body, int64_t items, int thread) {
  for (int64_t i; (i = next_item_.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, thread);
}

void ThreadPool::WorkerLoop(int thread) {
  uint32_t seen = 0;
  while (true) {
    seen = WaitForChange(round_, seen);
    if (stop_) return;
    RunItems(*body_, items_, thread);
    if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) working_.notify_one();
  }
}

}  // namespace nibble
