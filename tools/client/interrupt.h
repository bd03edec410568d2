// Ctrl-C and SIGTERM as an ordinary event: the first one cancels what runs, the second one ends the process.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>

namespace nibble {

// One per process, made in main before any thread: it blocks the signals for every thread started later, and a thread
// of its own waits for them (sigwait), so handlers may lock and call gRPC.
class Interrupt {
 public:
  Interrupt();

  bool raised() const { return raised_; }
  // Forgets a signal that was dealt with (a chat goes on after a cancelled answer).
  void Clear() { raised_ = false; }

  // While an object of this class lives, `cancel` is what the first signal does; without one a signal ends the process
  // with exit code 130. `cancel` runs in the signal thread, at once when a signal came before.
  class Scope {
   public:
    Scope(Interrupt* interrupt, std::function<void()> cancel);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Interrupt* const interrupt_;
  };

 private:
  void Watch();

  std::atomic<bool> raised_ = false;
  std::mutex mutex_;
  std::function<void()> cancel_;
};

}  // namespace nibble
