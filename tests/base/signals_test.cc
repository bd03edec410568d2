#include "common/base/signals.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace nibble {
namespace {

// Signals belong to a process, so each test plays in a child of its own.
int ExitStatusOf(void (*body)()) {
  const pid_t child = fork();
  if (child == 0) {
    body();
    _exit(99);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

TEST(ShutdownSignals, TheFirstIsWaitedForEvenWhenItCameEarly) {
  EXPECT_EQ(ExitStatusOf([] {
              BlockShutdownSignals();
              kill(getpid(), SIGTERM);
              _exit(WaitForShutdownSignal());
            }),
            SIGTERM);
}

TEST(ShutdownSignals, TheSecondEndsTheProcess) {
  EXPECT_EQ(ExitStatusOf([] {
              BlockShutdownSignals();
              kill(getpid(), SIGTERM);
              WaitForShutdownSignal();
              ExitOnNextShutdownSignal();
              kill(getpid(), SIGINT);
              pause();
            }),
            128 + SIGINT);
}

TEST(ShutdownSignals, ABrokenPipeIsAnErrorCode) {
  EXPECT_EQ(ExitStatusOf([] {
              BlockShutdownSignals();
              int ends[2];
              if (pipe(ends) != 0) _exit(98);
              close(ends[0]);
              _exit(write(ends[1], "x", 1) == -1 && errno == EPIPE ? 7 : 8);
            }),
            7);
}

}  // namespace
}  // namespace nibble
