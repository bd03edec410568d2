#include "tests/integration/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "common/base/check.h"
#include "gtest/gtest.h"

namespace nibble::testing {
namespace {

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  NIBBLE_CHECK(value != nullptr, std::string(name) + " is not set; run through ctest");
  return value;
}

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

// A sanitizer's report fails the test that started the process, also when the process lived on or nobody missed it.
void ExpectNoSanitizerReport(const std::string& log_path) {
  const std::string log = ReadAll(log_path);
  for (const char* mark : {"Sanitizer: ", ": runtime error: "}) {
    const size_t at = log.find(mark);
    if (at != std::string::npos) ADD_FAILURE() << log_path << ":\n" << log.substr(log.rfind('\n', at) + 1, 4000);
  }
}

struct Scratch {
  Scratch() {
    std::string pattern = (std::filesystem::temp_directory_path() / "nibble-test-XXXXXX").string();
    NIBBLE_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
    path = pattern;
  }
  ~Scratch() {
    const auto* unit = ::testing::UnitTest::GetInstance();
    if (unit->Failed()) {
      std::fprintf(stderr, "logs kept in %s\n", path.c_str());
      return;
    }
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::string path;
};

}  // namespace

std::string Binary(const std::string& name) { return Environment("NIBBLE_BIN_DIR") + "/" + name; }
std::string SourcePath(const std::string& relative) { return Environment("NIBBLE_SOURCE_DIR") + "/" + relative; }

std::string ScratchDir() {
  static Scratch scratch;
  return scratch.path;
}

Process::Process(std::vector<std::string> argv, std::string log_path) : log_path_(std::move(log_path)) {
  std::vector<char*> args;
  for (auto& a : argv) args.push_back(a.data());
  args.push_back(nullptr);
  const int log = open(log_path_.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644);
  NIBBLE_CHECK(log >= 0, log_path_);
  const pid_t parent = getpid();
  pid_ = fork();
  NIBBLE_CHECK(pid_ >= 0, "fork");
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
    dup2(log, STDOUT_FILENO);
    dup2(log, STDERR_FILENO);
    execv(args[0], args.data());
    dprintf(STDERR_FILENO, "cannot start %s\n", args[0]);
    _exit(127);
  }
  close(log);
}

Process::Process(Process&& other) noexcept { *this = std::move(other); }
Process& Process::operator=(Process&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(status_, other.status_);
  std::swap(log_path_, other.log_path_);
  return *this;
}

Process::~Process() {
  if (pid_ > 0 && Running()) {
    Signal(SIGKILL);
    Wait(std::chrono::seconds(10));
  }
  if (pid_ > 0) ExpectNoSanitizerReport(log_path_);
}

void Process::Signal(int signal) const {
  if (pid_ > 0 && !status_.has_value()) kill(pid_, signal);
}

std::optional<int> Process::Wait(std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  while (!status_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      status_ = status;
      break;
    }
    if (std::chrono::steady_clock::now() >= end) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return status_;
}

bool Process::Running() { return !Wait(std::chrono::milliseconds(0)).has_value(); }

std::string Process::Log() const { return ReadAll(log_path_); }

double Process::CpuSeconds() const {
  const std::string stat = ReadAll("/proc/" + std::to_string(pid_) + "/stat");
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return 0;
  std::istringstream in(stat.substr(name_end + 2));
  std::string field;
  double ticks = 0;
  for (int i = 3; in >> field && i <= 15; ++i) {
    if (i == 14 || i == 15) ticks += std::stod(field);
  }
  return ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

int64_t Process::ResidentBytes() const {
  std::istringstream in(ReadAll("/proc/" + std::to_string(pid_) + "/statm"));
  int64_t size = 0, resident = 0;
  in >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

RunResult RunBinary(std::vector<std::string> argv, std::chrono::seconds timeout) {
  static int counter = 0;
  const std::string log = ScratchDir() + "/run-" + std::to_string(counter++) + ".log";
  Process process(std::move(argv), log);
  const auto status = process.Wait(timeout);
  RunResult result;
  result.output = process.Log();
  if (!status.has_value()) return result;
  result.exit_code = WIFEXITED(*status) ? WEXITSTATUS(*status) : 128 + WTERMSIG(*status);
  return result;
}

std::string WaitForFile(const std::string& path, Process& process, std::chrono::milliseconds timeout) {
  const auto end = std::chrono::steady_clock::now() + timeout;
  while (std::chrono::steady_clock::now() < end && process.Running()) {
    if (std::filesystem::exists(path)) {
      std::string text = ReadAll(path);
      if (!text.empty() && text.back() == '\n') return text;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return "";
}

}  // namespace nibble::testing
