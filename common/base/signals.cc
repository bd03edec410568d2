#include "common/base/signals.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "common/base/check.h"

namespace nibble {
namespace {

sigset_t ShutdownSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  return set;
}

}  // namespace

void BlockShutdownSignals() {
  const sigset_t set = ShutdownSignals();
  NIBBLE_CHECK_EQ(pthread_sigmask(SIG_BLOCK, &set, nullptr), 0);
  struct sigaction ignore {};
  ignore.sa_handler = SIG_IGN;
  NIBBLE_CHECK_EQ(sigaction(SIGPIPE, &ignore, nullptr), 0);
}

int WaitForShutdownSignal() {
  const sigset_t set = ShutdownSignals();
  int signal = 0;
  NIBBLE_CHECK_EQ(sigwait(&set, &signal), 0);
  return signal;
}

void ExitOnNextShutdownSignal() {
  struct sigaction leave {};
  leave.sa_handler = [](int signal) { _exit(128 + signal); };
  const sigset_t set = ShutdownSignals();
  NIBBLE_CHECK_EQ(sigaction(SIGTERM, &leave, nullptr), 0);
  NIBBLE_CHECK_EQ(sigaction(SIGINT, &leave, nullptr), 0);
  NIBBLE_CHECK_EQ(pthread_sigmask(SIG_UNBLOCK, &set, nullptr), 0);
}

}  // namespace nibble
