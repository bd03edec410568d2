// How many log lines of one kind are written a second. What a peer can cause, it can cause in a loop: the rest is
// counted, and told with the next line.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>

namespace nibble {

class LineBudget {
 public:
  using Clock = std::chrono::steady_clock;

  explicit LineBudget(int lines_per_second) : lines_per_second_(lines_per_second) {}

  // True when a line may be written now; *left_out is then how many were not since the last one. From any thread.
  bool Take(Clock::time_point now, uint64_t* left_out) {
    std::lock_guard lock(mutex_);
    if (now - second_ >= std::chrono::seconds(1)) {
      second_ = now;
      lines_ = 0;
    }
    if (lines_ == lines_per_second_) {
      ++left_out_;
      return false;
    }
    ++lines_;
    *left_out = left_out_;
    left_out_ = 0;
    return true;
  }

 private:
  const int lines_per_second_;
  std::mutex mutex_;
  Clock::time_point second_;  // when it began
  int lines_ = 0;             // written in it
  uint64_t left_out_ = 0;
};

}  // namespace nibble
