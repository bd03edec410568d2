#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

#include "common/metrics/buckets.h"
#include "common/metrics/registry.h"
#include "common/metrics/server.h"

namespace nibble {
namespace {

std::string HttpGet(uint16_t port, const std::string& path) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string text;
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request = "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = read(fd, buffer, sizeof(buffer))) > 0;) text.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return text;
}

TEST(MetricRegistry, MembersOfAFamilyShareTheirName) {
  MetricRegistry metrics;
  Counter& ok = metrics.AddCounter({"nibble_requests_total", "Requests.", {{"code", "OK"}}});
  metrics.AddCounter({"nibble_requests_total", "Requests.", {{"code", "CANCELLED"}}});
  EXPECT_EQ(&ok, &metrics.AddCounter({"nibble_requests_total", "Requests.", {{"code", "OK"}}}));
  ok.Increment(3);
  metrics.AddGauge({"nibble_free_pages", "Free pages."}).Set(17);
  metrics.AddHistogram({"nibble_wait_seconds", "Waits."}, kLatencyBuckets).Observe(0.001);
  const std::string text = metrics.Text();
  EXPECT_NE(text.find("# HELP nibble_requests_total Requests.\n# TYPE nibble_requests_total counter\n"),
            std::string::npos);
  EXPECT_NE(text.find("nibble_requests_total{code=\"OK\"} 3\n"), std::string::npos) << text;
  EXPECT_NE(text.find("nibble_requests_total{code=\"CANCELLED\"} 0\n"), std::string::npos);
  EXPECT_NE(text.find("nibble_free_pages 17\n"), std::string::npos);
  EXPECT_NE(text.find("nibble_wait_seconds_bucket{le=\"0.001\"} 1\n"), std::string::npos) << text;
}

TEST(MetricRegistry, BucketSetsAscend) {
  const auto ascends = [](std::span<const double> buckets) {
    for (size_t i = 1; i < buckets.size(); ++i) {
      if (buckets[i] <= buckets[i - 1]) return false;
    }
    return buckets.front() > 0;
  };
  EXPECT_TRUE(ascends(kTokenBuckets));
  EXPECT_TRUE(ascends(kLatencyBuckets));
  EXPECT_TRUE(ascends(kRequestBuckets));
  EXPECT_TRUE(ascends(kStepBuckets));
  EXPECT_TRUE(ascends(kCountBuckets));
}

TEST(MetricRegistryDeathTest, ABadNameIsABug) {
  MetricRegistry metrics;
  EXPECT_DEATH(metrics.AddCounter({"bad-name", ""}), "bad-name");
  metrics.AddCounter({"nibble_x", ""});
  EXPECT_DEATH(metrics.AddGauge({"nibble_x", ""}), "nibble_x");
}

TEST(MetricsServer, ServesRegistryAndProcess) {
  MetricRegistry metrics;
  metrics.AddCounter({"nibble_steps_total", "Steps."}).Increment();
  auto server = MetricsServer::Start("127.0.0.1:0", metrics);
  ASSERT_TRUE(server.ok()) << server.status();
  const std::string page = HttpGet((*server)->address().port, "/metrics");
  EXPECT_NE(page.find("200 OK"), std::string::npos) << page;
  EXPECT_NE(page.find("nibble_steps_total 1\n"), std::string::npos) << page;
  for (const char* name : {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds",
                           "process_start_time_seconds", "process_threads"}) {
    const size_t at = page.find(std::string("\n") + name + " ");
    ASSERT_NE(at, std::string::npos) << name << "\n" << page;
    EXPECT_GT(std::stod(page.substr(at + std::string(name).size() + 2)), 0) << name;
  }
}

TEST(MetricsServer, ATakenPortIsAClearError) {
  MetricRegistry metrics;
  auto first = MetricsServer::Start("127.0.0.1:0", metrics);
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string address = (*first)->address().ToString();
  EXPECT_EQ(MetricsServer::Start(address, metrics).status(),
            absl::UnavailableError("cannot listen on " + address + ": Address already in use"));
}

}  // namespace
}  // namespace nibble
