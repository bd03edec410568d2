// SIGTERM and SIGINT as something main waits for, not as something that interrupts.
//
//   BlockShutdownSignals();          // first line of main
//   ... start threads, serve ...
//   WaitForShutdownSignal();         // the first signal: drain
//   ExitOnNextShutdownSignal();      // the second: leave now
#pragma once

namespace nibble {

// Blocks SIGTERM and SIGINT in this thread and every thread it starts later, and ignores SIGPIPE (a closed connection
// is an error code, not the end of the process). Before any other thread exists.
void BlockShutdownSignals();

// Returns the signal's number. A signal that came between BlockShutdownSignals and now counts.
int WaitForShutdownSignal();

// From now on SIGTERM or SIGINT ends the process with status 128 + signal, without any clean-up. A handler, not the
// default action: the kernel ignores default-action signals to the first process of a container.
void ExitOnNextShutdownSignal();

}  // namespace nibble
