#include "common/base/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace nibble {
namespace {

constexpr int kBarCells = 28;
constexpr char kCell[] = "━";
constexpr char kAccent[] = "\x1b[36m", kDim[] = "\x1b[2m", kReset[] = "\x1b[0m";

std::string Printf(const char* format, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, format, value);
  return buffer;
}

std::string Repeat(std::string_view piece, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += piece;
  return out;
}

int TerminalColumns(FILE* stream) {
  winsize size{};
  if (ioctl(fileno(stream), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

}  // namespace

std::string FormatClock(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0 || seconds > 1e9) return "--:--";
  const int64_t s = std::llround(seconds);
  char buffer[48];
  if (s >= 3600) {
    std::snprintf(buffer, sizeof buffer, "%lld:%02lld:%02lld", static_cast<long long>(s / 3600),
                  static_cast<long long>(s / 60 % 60), static_cast<long long>(s % 60));
  } else {
    std::snprintf(buffer, sizeof buffer, "%lld:%02lld", static_cast<long long>(s / 60), static_cast<long long>(s % 60));
  }
  return buffer;
}

std::string FormatRate(double per_second) {
  if (!std::isfinite(per_second) || per_second < 0) return "-";
  if (per_second >= 1e6) return Printf("%.1fM", per_second / 1e6);
  if (per_second >= 1e4) return Printf("%.1fk", per_second / 1e3);
  if (per_second >= 100) return Printf("%.0f", per_second);
  if (per_second >= 10) return Printf("%.1f", per_second);
  return Printf("%.2f", per_second);
}

std::string FormatProgress(const ProgressOptions& options, int64_t done, double elapsed_s, std::string_view note,
                           int bar_cells, bool colour) {
  const bool bounded = options.total > 0;
  const double fraction = bounded ? std::clamp(static_cast<double>(done) / options.total, 0.0, 1.0) : 0;
  const double rate = elapsed_s > 0 ? done / elapsed_s : 0;

  std::string line = options.label + "  ";
  if (bounded && bar_cells > 0) {
    const int filled = static_cast<int>(fraction * bar_cells);
    line += (colour ? kAccent : "") + Repeat(kCell, filled) + (colour ? kReset : "");
    line += colour ? kDim + Repeat(kCell, bar_cells - filled) + kReset : Repeat(" ", bar_cells - filled);
    line += "  ";
  }
  line += std::to_string(done);
  if (bounded) line += "/" + std::to_string(options.total);
  line += " " + options.unit;
  if (bounded) line += Printf("  %.0f%%", std::floor(fraction * 100));
  if (done > 0 && elapsed_s > 0) line += "  " + FormatRate(rate) + " " + options.unit + "/s";
  if (bounded && done < options.total) {
    line += "  " + FormatClock(done > 0 ? (options.total - done) / rate : -1) + " left";
  }
  if (!note.empty()) line += std::string("  ") + (colour ? kDim : "") + std::string(note) + (colour ? kReset : "");
  return line;
}

Progress::Progress(ProgressOptions options)
    : options_(std::move(options)), terminal_(isatty(fileno(options_.stream)) == 1) {}

Progress::~Progress() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (finished_ || !drawn_) return;
  Draw(/*last=*/true);
}

void Progress::Add(int64_t n, std::string_view note) {
  const std::lock_guard<std::mutex> lock(mutex_);
  done_ += n;
  if (!note.empty()) note_ = note;
  Draw(/*last=*/false);
}

void Progress::Tick(std::string_view note) { Add(0, note); }

void Progress::Finish() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (finished_) return;
  finished_ = true;
  note_.clear();
  if (terminal_ || drawn_) Draw(/*last=*/true);
}

void Progress::Draw(bool last) {
  const Clock::time_point now = Clock::now();
  const double period_s = terminal_ ? options_.terminal_period_s : options_.plain_period_s;
  if (!last && now - last_draw_ < std::chrono::duration<double>(period_s)) return;
  last_draw_ = now;
  drawn_ = true;

  const double elapsed_s = std::chrono::duration<double>(now - start_).count();
  const std::string took = finished_ ? "  in " + Printf("%.1f s", elapsed_s) : "";
  if (!terminal_) {
    const std::string line = FormatProgress(options_, done_, elapsed_s, note_, /*bar_cells=*/0, /*colour=*/false);
    std::fprintf(options_.stream, "%s%s\n", line.c_str(), took.c_str());
    std::fflush(options_.stream);
    return;
  }
  // Every visible byte but the bar's cells is one column; a note that would wrap the line is cut.
  const int columns = TerminalColumns(options_.stream);
  const int bare = static_cast<int>(FormatProgress(options_, done_, elapsed_s, {}, 0, false).size() + took.size());
  const int cells = std::clamp(columns - bare - 3, 0, kBarCells);
  const int room = columns - bare - cells - 5;
  size_t note_bytes = std::min(note_.size(), static_cast<size_t>(std::max(room, 0)));
  while (note_bytes > 0 && note_bytes < note_.size() && (note_[note_bytes] & 0xC0) == 0x80) --note_bytes;  // UTF-8
  const std::string_view note = std::string_view(note_).substr(0, note_bytes);
  const std::string line = FormatProgress(options_, done_, elapsed_s, note, cells, /*colour=*/true);
  std::fprintf(options_.stream, "\r\x1b[K%s%s%s", line.c_str(), took.c_str(), last ? "\n" : "");
  std::fflush(options_.stream);
}

}  // namespace nibble
