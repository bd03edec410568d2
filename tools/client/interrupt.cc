#include "tools/client/interrupt.h"

#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <thread>
#include <utility>

#include "common/base/check.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

sigset_t Signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}

}  // namespace

Interrupt::Interrupt() {
  const sigset_t set = Signals();
  NIBBLE_CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, nullptr), 0);
  // A closed pipe (`nibble generate | head`) is an error of write(2), reported like any other.
  std::signal(SIGPIPE, SIG_IGN);
  std::thread([this] { Watch(); }).detach();  // lives as long as the process
}

void Interrupt::Watch() {
  const sigset_t set = Signals();
  while (true) {
    int signal = 0;
    if (sigwait(&set, &signal) != 0) continue;
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool second = raised_.exchange(true);
    if (second || !cancel_) {
      if (isatty(STDERR_FILENO) == 1) (void)!write(STDERR_FILENO, "\n", 1);
      _exit(kExitInterrupted);
    }
    cancel_();
  }
}

Interrupt::Scope::Scope(Interrupt* interrupt, std::function<void()> cancel) : interrupt_(interrupt) {
  const std::lock_guard<std::mutex> lock(interrupt_->mutex_);
  if (interrupt_->raised_) cancel();
  interrupt_->cancel_ = std::move(cancel);
}

Interrupt::Scope::~Scope() {
  const std::lock_guard<std::mutex> lock(interrupt_->mutex_);
  interrupt_->cancel_ = nullptr;
}

}  // namespace nibble
