// Real binaries as child processes. A child never outlives its Process object, nor the test that made it.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace nibble::testing {

// $NIBBLE_BIN_DIR/name, as ctest sets it.
std::string Binary(const std::string& name);
std::string SourcePath(const std::string& relative);

// A directory of this test process, removed at exit unless a test failed (the logs are then the evidence).
std::string ScratchDir();

class Process {
 public:
  // Starts argv[0] with stdout and stderr appended to `log_path`.
  Process(std::vector<std::string> argv, std::string log_path);
  ~Process();  // SIGKILL when still alive
  Process(Process&& other) noexcept;
  Process& operator=(Process&& other) noexcept;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const;
  // Exit status as waitpid gives it, or nothing when the time is over.
  std::optional<int> Wait(std::chrono::milliseconds timeout);
  bool Running();
  std::string Log() const;
  const std::string& log_path() const { return log_path_; }
  double CpuSeconds() const;      // user + system, of /proc/PID/stat
  int64_t ResidentBytes() const;

 private:
  pid_t pid_ = -1;
  std::optional<int> status_;
  std::string log_path_;
};

// Runs to the end; returns exit code (128 + signal when killed) and output.
struct RunResult {
  int exit_code = -1;
  std::string output;
};
RunResult RunBinary(std::vector<std::string> argv, std::chrono::seconds timeout = std::chrono::seconds(120));

// The text of a file once it exists and is not empty; empty string when the time is over or `process` ended.
std::string WaitForFile(const std::string& path, Process& process, std::chrono::milliseconds timeout);

}  // namespace nibble::testing
