// A fixed set of threads for data-parallel loops whose items write disjoint outputs, so that the result does not depend
// on which thread ran which item.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace nibble {

class ThreadPool {
 public:
  // `threads` counts the calling thread: 1 starts none, and ParallelFor is then a plain loop.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(item, thread) once for every item in [0, items), `thread` in [0, threads()) telling whose scratch memory
  // to use; 0 is the caller. Returns when all calls have returned. One ParallelFor at a time; body must not call it.
  void ParallelFor(int64_t items, absl::FunctionRef<void(int64_t item, int thread)> body);

 private:
  using Body = absl::FunctionRef<void(int64_t, int)>;

  void WorkerLoop(int thread);
  void RunItems(const Body& body, int64_t items, int thread);

  std::vector<std::thread> workers_;
  // Written by the caller before round_ is advanced (release), read by workers after they saw it (acquire).
  const Body* body_ = nullptr;
  int64_t items_ = 0;
  bool stop_ = false;
  std::atomic<int64_t> next_item_{0};
  std::atomic<uint32_t> round_{0};   // advanced once per ParallelFor; workers wait on it
  std::atomic<int32_t> working_{0};  // workers that have not finished the current round
};

}  // namespace nibble
