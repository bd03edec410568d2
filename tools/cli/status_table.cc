#include "tools/cli/status_table.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/base/progress.h"
#include "tools/client/terminal_text.h"

namespace nibble {
namespace {

constexpr int kBarCells = 10;

struct Cell {
  std::string text;
  bool right = false;      // numbers
  const char* style = "";  // ANSI escape, when colour is on
};

const char* StateStyle(const v1::ReplicaStatus& replica) {
  if (replica.ready()) return "\x1b[32m";
  return replica.state() == "down" ? "\x1b[31m" : "\x1b[33m";
}

std::string PageBar(uint32_t used, uint32_t total) {
  if (total == 0) return "-";
  const int filled = static_cast<int>((static_cast<int64_t>(used) * kBarCells + total - 1) / total);
  std::string bar;
  for (int i = 0; i < kBarCells; ++i) bar += i < filled ? "█" : "░";
  return absl::StrFormat("%s %u/%u", bar, used, total);
}

std::vector<Cell> Row(const v1::ReplicaStatus& replica) {
  const uint32_t used = replica.total_pages() - std::min(replica.free_pages(), replica.total_pages());
  return {{absl::StrCat(replica.index())},
          {ForTerminal(replica.state()), false, StateStyle(replica)},
          {absl::StrCat(replica.num_requests_running()), true},
          {absl::StrCat(replica.num_requests_waiting()), true},
          {PageBar(used, replica.total_pages())},
          {absl::StrCat(replica.cached_pages()), true},
          {absl::StrCat(replica.steps()), true},
          {FormatRate(replica.generation_tokens_per_second()), true},
          {ForTerminal(absl::StrJoin(replica.workers(), " "))}};
}

std::string Line(const std::vector<Cell>& cells, const std::vector<size_t>& widths, bool colour) {
  std::string line;
  for (size_t i = 0; i < cells.size(); ++i) {
    const Cell& cell = cells[i];
    const std::string padding(widths[i] - Columns(cell.text), ' ');
    const bool styled = colour && cell.style[0] != '\0';
    const std::string text = styled ? absl::StrCat(cell.style, cell.text, "\x1b[0m") : cell.text;
    const bool last = i + 1 == cells.size();
    absl::StrAppend(&line, i > 0 ? "  " : "", cell.right ? padding : "", text, cell.right || last ? "" : padding);
  }
  return line + "\n";
}

}  // namespace

int ReadyReplicas(const v1::GetStatusResponse& status) {
  return static_cast<int>(std::count_if(status.replicas().begin(), status.replicas().end(),
                                        [](const v1::ReplicaStatus& replica) { return replica.ready(); }));
}

std::string FormatStatus(const v1::GetModelInfoResponse& model, const v1::GetStatusResponse& status, bool colour) {
  const char* bold = colour ? "\x1b[1m" : "";
  const char* dim = colour ? "\x1b[2m" : "";
  const char* red = colour ? "\x1b[31m" : "";
  const char* reset = colour ? "\x1b[0m" : "";
  std::string out = absl::StrFormat(
      "%s%s%s  %s · %u layers · hidden %u · context %u · vocabulary %u\n%snibble %s · up %s · %d of %d replicas "
      "ready%s\n\n",
      bold, ForTerminal(model.model_name()), reset, ForTerminal(model.quantization()), model.num_layers(),
      model.hidden_size(), model.max_context_length(), model.vocab_size(), dim, ForTerminal(status.version()),
      FormatClock(status.uptime_seconds()), ReadyReplicas(status), status.replicas_size(), reset);

  std::vector<std::vector<Cell>> rows = {{{"REPLICA", false, dim},
                                          {"STATE", false, dim},
                                          {"RUNNING", true, dim},
                                          {"WAITING", true, dim},
                                          {"PAGES USED", false, dim},
                                          {"CACHED", true, dim},
                                          {"STEPS", true, dim},
                                          {"TOKENS/S", true, dim},
                                          {"WORKERS", false, dim}}};
  for (const v1::ReplicaStatus& replica : status.replicas()) rows.push_back(Row(replica));
  std::vector<size_t> widths(rows.front().size());
  for (const std::vector<Cell>& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Columns(row[i].text));
  }
  out += Line(rows[0], widths, colour);
  for (int i = 0; i < status.replicas_size(); ++i) {
    out += Line(rows[static_cast<size_t>(i) + 1], widths, colour);
    const std::string& error = status.replicas(i).last_error();
    if (!error.empty()) absl::StrAppend(&out, "         ", red, "last error:", reset, " ", ForTerminal(error), "\n");
  }
  return out;
}

nlohmann::json StatusJson(const v1::GetModelInfoResponse& model, const v1::GetStatusResponse& status) {
  nlohmann::json replicas = nlohmann::json::array();
  for (const v1::ReplicaStatus& replica : status.replicas()) {
    replicas.push_back({{"index", replica.index()},
                        {"ready", replica.ready()},
                        {"state", replica.state()},
                        {"last_error", replica.last_error()},
                        {"workers", std::vector<std::string>(replica.workers().begin(), replica.workers().end())},
                        {"num_requests_running", replica.num_requests_running()},
                        {"num_requests_waiting", replica.num_requests_waiting()},
                        {"total_pages", replica.total_pages()},
                        {"free_pages", replica.free_pages()},
                        {"cached_pages", replica.cached_pages()},
                        {"steps", replica.steps()},
                        {"generation_tokens_per_second", replica.generation_tokens_per_second()}});
  }
  nlohmann::json bos = model.has_bos_token_id() ? nlohmann::json(model.bos_token_id()) : nlohmann::json(nullptr);
  return {{"ready", ReadyReplicas(status) > 0},
          {"version", status.version()},
          {"uptime_seconds", status.uptime_seconds()},
          {"model",
           {{"model_name", model.model_name()},
            {"quantization", model.quantization()},
            {"vocab_size", model.vocab_size()},
            {"max_context_length", model.max_context_length()},
            {"eos_token_ids", std::vector<uint32_t>(model.eos_token_ids().begin(), model.eos_token_ids().end())},
            {"bos_token_id", std::move(bos)},
            {"num_layers", model.num_layers()},
            {"hidden_size", model.hidden_size()},
            {"has_chat_template", model.has_chat_template()}}},
          {"replicas", std::move(replicas)}};
}

}  // namespace nibble
