// Progress of a long job, on stderr: a bar with rate and time left on a terminal, a plain line every few seconds
// elsewhere (logs, CI), nothing at all for jobs that end before the first line would be due.
//   Progress progress({.label = "quantize", .unit = "tensors", .total = 120});
//   for (...) { Work(); progress.Add(1, name); }
//   progress.Finish();
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <string_view>

namespace nibble {

struct ProgressOptions {
  std::string label;      // what is being done: "quantize", "requests"
  std::string unit;       // plural: "tensors", "windows"
  int64_t total = 0;      // items; 0 = unknown: count and rate only
  FILE* stream = stderr;  // not owned
  double terminal_period_s = 0.1;
  double plain_period_s = 5;  // between lines when the stream is no terminal
};

// One line of progress without line end: "quantize  42/120 tensors  35%  12.3 tensors/s  0:06 left  layer.3".
// bar_cells = 0 leaves the bar out (plain lines); colour adds ANSI escapes. Pure, so that it can be tested.
std::string FormatProgress(const ProgressOptions& options, int64_t done, double elapsed_s, std::string_view note,
                           int bar_cells, bool colour);

// "0:07", "12:05", "3:00:41"; "--:--" when negative or not finite.
std::string FormatClock(double seconds);

// "0.52", "12.3", "1830", "17.2k", "3.1M": three digits that matter.
std::string FormatRate(double per_second);

// Thread-safe. Writes happen in the calling thread, at most one per period.
class Progress {
 public:
  explicit Progress(ProgressOptions options);
  ~Progress();  // without Finish (an error came first): leaves the last state on its own line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // n more items are done; note (optional) names the newest one.
  void Add(int64_t n = 1, std::string_view note = {});

  // Draws without counting: keeps rate and time alive while one item takes long.
  void Tick(std::string_view note = {});

  // Ends the line with the total time. Idempotent.
  void Finish();

 private:
  void Draw(bool last);

  using Clock = std::chrono::steady_clock;
  const ProgressOptions options_;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  std::mutex mutex_;
  int64_t done_ = 0;
  std::string note_;
  Clock::time_point last_draw_ = start_;
  bool drawn_ = false;
  bool finished_ = false;
};

}  // namespace nibble
