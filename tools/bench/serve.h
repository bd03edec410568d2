// `nibble-bench serve`: load a running router and report what its clients felt.
#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include "tools/bench/workload.h"
#include "tools/client/interrupt.h"
#include "tools/client/server_flags.h"

namespace CLI {
class App;
}

namespace nibble {

struct ServeFlags {
  ServerFlags server;
  WorkloadOptions workload;
  std::string request_rate = "inf";
  std::vector<std::string> goodput;
  std::vector<double> percentiles = {99};
  std::string json_file;  // "-" = stdout, instead of the table
  int64_t max_concurrency = 0;
  int64_t warmup = 1;
  int64_t connections = 4;
  double request_timeout_s = 0;
  bool detailed = false;
};
void AddServeFlags(CLI::App* app, ServeFlags* flags);

// The report goes to out, everything else to err. Exit code (tools/client/rpc_error.h): 0 when every request succeeded,
// 1 when one failed or the file could not be written. interrupt may be null.
int ServeCommand(ServeFlags flags, std::ostream& out, std::ostream& err, Interrupt* interrupt);

}  // namespace nibble
