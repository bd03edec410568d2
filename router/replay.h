// Sequences without a ready replica, because theirs went down or because they came when none was: they wait here, for a
// bounded time.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "router/sequence.h"

namespace nibble {

class ReplayQueue {
 public:
  // Both run on the queue's thread, without its lock: `place` a sequence after Wake (it may be parked again, until the
  // same time), `give_up` one whose time is over.
  ReplayQueue(std::function<void(std::unique_ptr<Sequence>, TimePoint until)> place,
              std::function<void(std::unique_ptr<Sequence>)> give_up);
  ~ReplayQueue();  // Stop

  void Park(std::unique_ptr<Sequence> sequence, TimePoint until);
  // A replica became ready: place everything, and what is parked next (it may have missed this one's readiness).
  void Wake();
  // What is parked, for admission's bounds.
  struct Load {
    uint64_t sequences = 0, prompt_tokens = 0;
  };
  Load load();
  // Gives up everything and ends the thread.
  void Stop();

 private:
  struct Parked {
    TimePoint until;
    std::unique_ptr<Sequence> sequence;
  };
  void Run();

  const std::function<void(std::unique_ptr<Sequence>, TimePoint)> place_;
  const std::function<void(std::unique_ptr<Sequence>)> give_up_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Parked> parked_;  // arrival order
  bool wake_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace nibble
