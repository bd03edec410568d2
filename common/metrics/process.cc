#include "common/metrics/process.h"

#include <dirent.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <string_view>

#include "common/base/file.h"

namespace nibble {
namespace {

double Seconds(const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6; }

// Field `index` (1-based, as proc(5) counts) of /proc/self/stat; the command name in field 2 may hold anything, so
// count behind it.
int64_t StatField(const std::string& stat, int index) {
  const size_t behind_name = stat.rfind(')');
  if (behind_name == std::string::npos) return 0;
  std::istringstream fields(stat.substr(behind_name + 1));
  std::string field;
  for (int i = 3; i <= index; ++i) fields >> field;
  int64_t value = 0;
  std::from_chars(field.data(), field.data() + field.size(), value);
  return value;
}

// Unix time of the last boot: process start times count from there.
int64_t BootTimeSeconds() {
  const auto stat = ReadSmallFile("/proc/stat", int64_t{16} << 20);
  if (!stat.ok()) return 0;
  const size_t at = stat->find("\nbtime ");
  return at == std::string::npos ? 0 : std::strtoll(stat->c_str() + at + 7, nullptr, 10);
}

int64_t OpenFiles() {
  DIR* dir = opendir("/proc/self/fd");
  if (dir == nullptr) return 0;
  int64_t count = -3;  // ".", ".." and the descriptor of this very listing
  while (readdir(dir) != nullptr) ++count;
  closedir(dir);
  return count;
}

prometheus::MetricFamily Family(const char* name, const char* help, prometheus::MetricType type, double value) {
  prometheus::ClientMetric metric;
  if (type == prometheus::MetricType::Counter) {
    metric.counter.value = value;
  } else {
    metric.gauge.value = value;
  }
  return {name, help, type, {metric}};
}

}  // namespace

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  using prometheus::MetricType;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  const std::string stat = ReadSmallFile("/proc/self/stat").value_or("");
  static const int64_t boot_time = BootTimeSeconds();
  const double start_time = static_cast<double>(boot_time) +
                            static_cast<double>(StatField(stat, 22)) / static_cast<double>(sysconf(_SC_CLK_TCK));
  const double resident = static_cast<double>(StatField(stat, 24)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  return {
      Family("process_cpu_seconds_total", "User and system CPU time spent, in seconds.", MetricType::Counter,
             Seconds(usage.ru_utime) + Seconds(usage.ru_stime)),
      Family("process_resident_memory_bytes", "Resident memory size in bytes.", MetricType::Gauge, resident),
      Family("process_virtual_memory_bytes", "Virtual memory size in bytes.", MetricType::Gauge,
             static_cast<double>(StatField(stat, 23))),
      Family("process_open_fds", "Number of open file descriptors.", MetricType::Gauge,
             static_cast<double>(OpenFiles())),
      Family("process_max_fds", "Maximum number of open file descriptors.", MetricType::Gauge,
             static_cast<double>(files.rlim_cur)),
      Family("process_threads", "Number of threads.", MetricType::Gauge, static_cast<double>(StatField(stat, 20))),
      Family("process_start_time_seconds", "Start time of the process, in seconds since the Unix epoch.",
             MetricType::Gauge, start_time),
  };
}

}  // namespace nibble
