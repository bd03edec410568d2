#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "common/base/file.h"
#include "worker/config.h"

namespace nibble {
namespace {

std::string Problems(const std::vector<std::string>& arguments) {
  const auto line = ParseWorkerCommandLine(arguments);
  EXPECT_FALSE(line.ok());
  EXPECT_EQ(line.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(line.status().message());
}

std::string WriteConfig(const std::string& text) {
  const std::string path = testing::TempDir() + "nibble_worker_" + std::to_string(getpid()) + ".yaml";
  EXPECT_TRUE(WriteFileAtomically(path, text).ok());
  return path;
}

TEST(WorkerConfig, FlagsSetEverything) {
  const auto line =
      ParseWorkerCommandLine({"--model", testing::TempDir(), "--listen", "0.0.0.0:7", "--backend=mock", "--threads",
                              "3", "--kv-memory", "2GiB", "--mock-step-us", "250", "--drain-timeout-s", "5",
                              "--collective-timeout-ms", "700", "--advertise-host", "10.0.0.1", "--log-level", "warn"});
  ASSERT_TRUE(line.ok()) << line.status();
  const WorkerConfig& c = line->config;
  EXPECT_EQ(c.listen, "0.0.0.0:7");
  EXPECT_EQ(c.backend, "mock");
  EXPECT_EQ(c.threads, 3);
  EXPECT_EQ(c.kv_memory_bytes, int64_t{2} << 30);
  EXPECT_EQ(c.mock_step_us, 250);
  EXPECT_EQ(c.drain_timeout_s, 5);
  EXPECT_EQ(c.collective_timeout_ms, 700);
  EXPECT_EQ(c.advertise_host, "10.0.0.1");
}

TEST(WorkerConfig, EveryProblemIsListed) {
  const std::string problems =
      Problems({"--model", "/nonexistent", "--listen", "nonsense", "--threads", "many", "--kv-memory", "5q",
                "--backend", "tpu", "--tls-cert", "a.pem", "--frobnicate"});
  for (const char* name : {"model is", "listen is", "threads is", "kv-memory is", "backend is", "tls-key", "'--frobnicate'"}) {
    EXPECT_NE(problems.find(name), std::string::npos) << name << " missing in:\n" << problems;
  }
}

TEST(WorkerConfig, FlagsWinOverTheFile) {
  const std::string path = WriteConfig("model: " + testing::TempDir() + "\nthreads: 2\nkv-memory: 64MiB\n");
  const auto line = ParseWorkerCommandLine({"--config", path, "--threads", "4"});
  ASSERT_TRUE(line.ok()) << line.status();
  EXPECT_EQ(line->config.threads, 4);
  EXPECT_EQ(line->config.kv_memory_bytes, int64_t{64} << 20);
  unlink(path.c_str());
}

TEST(WorkerConfig, HelpAndVersionPrintAndExit) {
  const auto help = ParseWorkerCommandLine({"--help"});
  ASSERT_TRUE(help.ok());
  EXPECT_NE(help->text.find("--kv-memory"), std::string::npos);
  const auto version = ParseWorkerCommandLine({"--version"});
  ASSERT_TRUE(version.ok());
  EXPECT_NE(version->text.find("nibble-worker 0."), std::string::npos);
}

}  // namespace
}  // namespace nibble
