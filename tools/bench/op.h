// `nibble-bench op`: time and check the operators of kernels/ops.h on one backend.
#pragma once

#include <iosfwd>
#include <string>

#include "kernels/ops.h"
#include "tools/bench/op_table.h"

namespace CLI {
class App;
}

namespace nibble {

struct OpFlags {
  OpsOptions ops;
  OpFilter filter;
  std::string json_file;  // "-" = stdout, instead of the table
  int replays = 5;
  int pause_ms = 20;      // before each measurement, so that the clock recovers
  bool check = true;
  bool baselines = true;  // cuBLASLt beside linears, on a GPU
};
void AddOpFlags(CLI::App* app, OpFlags* flags);

// The table goes to out, progress and errors to err. Exit code: 0 when every output was right, 1 when one was not or a
// file could not be written, 2 for arguments that do not exist, 3 when the backend is not there.
int OpCommand(const OpFlags& flags, const std::string& command, std::ostream& out, std::ostream& err);

}  // namespace nibble
