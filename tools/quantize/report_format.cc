#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/quantize/report.h"

namespace nibble {
namespace {

constexpr size_t kReadersOf[] = {0, 3, 4, 6};  // the first linear that reads each input

double Share(int64_t part, int64_t whole) {
  return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
}

std::string Percent(const std::optional<double>& share) {
  return share ? absl::StrFormat("%.2f", 100 * *share) : "-";
}

}  // namespace

std::string FormatReport(const QuantizationReport& report) {
  std::string out = absl::StrFormat("%s  %s  from %s  %.1f M parameters\n\n", report.quantized, report.mode,
                                    report.model, static_cast<double>(report.parameters) / 1e6);
  if (report.divergence) {
    const DivergenceReport& d = *report.divergence;
    absl::StrAppendFormat(&out, "perplexity       %.4f   float %.4f   ratio %.4f   (%d tokens, windows of %d)\n",
                          d.perplexity, d.reference_perplexity, d.perplexity / d.reference_perplexity, d.tokens,
                          report.window);
    absl::StrAppendFormat(&out, "KL to float      %.5f nats mean   %.4f p99   same best token %.2f %%\n", d.mean_kl,
                          d.p99_kl, 100 * d.top1_agreement);
  }
  for (const QuantizationReport::Size& size : report.sizes) {
    absl::StrAppendFormat(&out, "%-19s %10.2f MB -> %10.2f MB\n", size.part,
                          static_cast<double>(size.float_bytes) / 1e6, static_cast<double>(size.quantized_bytes) / 1e6);
  }
  absl::StrAppendFormat(&out, "KV cache            %10d B  -> %10d B  a token (bf16 -> KV4)\n",
                        report.float_kv_bytes_per_token, report.kv_bytes_per_token);
  absl::StrAppendFormat(&out, "8-bit blocks        %10d of %d (%.1f %%)\n\n", report.eight_bit_blocks(),
                        report.blocks(), 100 * Share(report.eight_bit_blocks(), report.blocks()));

  absl::StrAppendFormat(&out, "%-5s %-7s %8s %8s   %-8s %11s %15s\n", "layer", "linear", "weight %", "output %",
                        "input", "8-bit", "peak / median");
  for (size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& layer = report.layers[i];
    for (size_t j = 0; j < layer.linears.size(); ++j) {
      const LinearReport& linear = layer.linears[j];
      absl::StrAppendFormat(&out, "%5d %-7s %8s %8s", i, linear.name, Percent(linear.weight_error),
                            Percent(linear.output_error));
      const auto reader = std::ranges::find(kReadersOf, j);
      if (reader != std::end(kReadersOf)) {
        const InputReport& input = layer.inputs[static_cast<size_t>(reader - std::begin(kReadersOf))];
        absl::StrAppendFormat(&out, "   %-8s %4d of %3d", input.name, input.eight_bit_blocks(), input.block_bits.size());
        if (!input.before.empty()) absl::StrAppendFormat(&out, "  %6.1f -> %.1f", input.before_peak, input.after_peak);
      }
      absl::StrAppend(&out, linear.fallback.empty() ? "" : "   rounded to nearest: " + linear.fallback, "\n");
    }
  }
  return out;
}

nlohmann::json ReportJson(const QuantizationReport& report) {
  nlohmann::json json = {{"model", report.model},
                         {"quantized", report.quantized},
                         {"mode", report.mode},
                         {"settings", report.settings},
                         {"parameters", report.parameters},
                         {"blocks", report.blocks()},
                         {"eight_bit_blocks", report.eight_bit_blocks()},
                         {"float_kv_bytes_per_token", report.float_kv_bytes_per_token},
                         {"kv_bytes_per_token", report.kv_bytes_per_token}};
  for (const QuantizationReport::Size& size : report.sizes) {
    json["sizes"].push_back(
        {{"part", size.part}, {"float_bytes", size.float_bytes}, {"quantized_bytes", size.quantized_bytes}});
  }
  if (report.divergence) {
    const DivergenceReport& d = *report.divergence;
    json["text"] = {{"tokens", d.tokens},
                    {"window", report.window},
                    {"perplexity", d.perplexity},
                    {"float_perplexity", d.reference_perplexity},
                    {"ratio", d.perplexity / d.reference_perplexity},
                    {"mean_kl", d.mean_kl},
                    {"p99_kl", d.p99_kl},
                    {"top1_agreement", d.top1_agreement}};
  }
  for (const LayerReport& layer : report.layers) {
    nlohmann::json entry;
    for (const LinearReport& linear : layer.linears) {
      nlohmann::json item = {{"name", linear.name}};
      if (linear.weight_error) item["weight_error"] = *linear.weight_error;
      if (linear.output_error) item["output_error"] = *linear.output_error;
      if (!linear.fallback.empty()) item["fallback"] = linear.fallback;
      entry["linears"].push_back(std::move(item));
    }
    for (const InputReport& input : layer.inputs) {
      nlohmann::json item = {{"name", input.name}, {"block_bits", input.block_bits}};
      if (!input.before.empty()) {
        item.update({{"before", input.before},
                     {"after", input.after},
                     {"before_peak", input.before_peak},
                     {"after_peak", input.after_peak}});
      }
      entry["inputs"].push_back(std::move(item));
    }
    json["layers"].push_back(std::move(entry));
  }
  return json;
}

}  // namespace nibble
