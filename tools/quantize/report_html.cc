#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "tools/quantize/report.h"

namespace nibble {
namespace {

constexpr size_t kPictureLayers = 6;   // small multiples of the layers with the largest outliers
constexpr size_t kSquares = 32;        // an input of more blocks is drawn as a bar
constexpr double kCellWidth = 208, kCellHeight = 64;

constexpr char kStyle[] = R"(
:root{--page:#fbfaf8;--surface:#fff;--ink:#1d2126;--muted:#6b7178;--rule:#e3e1dc;--before:#b9b4aa;--accent:#2c6e8f}
@media (prefers-color-scheme:dark){:root{--page:#15181b;--surface:#1c2024;--ink:#e8e6e1;--muted:#979da4;--rule:#30353b;--before:#6a6f76;--accent:#6fb3d2}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1040px;padding:40px 24px 64px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:26px;font-weight:600;margin:0}
h2{font-size:17px;font-weight:600;margin:44px 0 4px}
p{margin:0 0 14px;color:var(--muted);max-width:72ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;background:var(--rule);border:1px solid var(--rule);margin-top:24px}
.tile{background:var(--surface);padding:14px 16px}
.tile b{display:block;font-size:24px;font-weight:600;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th{font-weight:500;color:var(--muted);text-align:right;padding:3px 10px}
td{text-align:right;padding:4px 10px;border:1px solid var(--page)}
td.name,th.name{text-align:left}
td small{opacity:.65;font-size:12px;padding-left:6px}
.settings td{border:0;border-bottom:1px solid var(--rule);text-align:left;padding:3px 24px 3px 0}
svg text{font:12px system-ui,sans-serif;fill:var(--muted)}
svg .ink{fill:var(--ink)}
.before{fill:var(--before)}.after{fill:var(--accent)}
.block{fill:none;stroke:var(--before)}.block8{fill:var(--accent);stroke:var(--accent)}
)";

std::string Escape(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

std::string Megabytes(int64_t bytes) {
  const double mb = static_cast<double>(bytes) / 1e6;
  return mb >= 10000 ? absl::StrFormat("%.1f GB", mb / 1000) : absl::StrFormat("%.2f MB", mb);
}

std::string Tile(const std::string& value, const std::string& label) {
  return absl::StrFormat("<div class=\"tile\"><b>%s</b><span>%s</span></div>\n", value, label);
}

std::string Tiles(const QuantizationReport& report) {
  std::string out = "<div class=\"tiles\">\n";
  if (report.divergence) {
    const DivergenceReport& d = *report.divergence;
    absl::StrAppend(&out,
                    Tile(absl::StrFormat("%.4f×", d.perplexity / d.reference_perplexity),
                         absl::StrFormat("perplexity %.3f, float %.3f", d.perplexity, d.reference_perplexity)),
                    Tile(absl::StrFormat("%.4f", d.mean_kl), absl::StrFormat("nats KL to float, p99 %.3f", d.p99_kl)),
                    Tile(absl::StrFormat("%.1f %%", 100 * d.top1_agreement), "same most likely token"));
  }
  absl::StrAppend(
      &out,
      Tile(absl::StrFormat("%.2f×", static_cast<double>(report.float_bytes()) /
                                        static_cast<double>(report.quantized_bytes())),
           absl::StrCat("smaller, ", Megabytes(report.quantized_bytes()))),
      Tile(absl::StrFormat("%d B", report.kv_bytes_per_token),
           absl::StrFormat("KV cache a token, bf16 %d B", report.float_kv_bytes_per_token)),
      Tile(absl::StrFormat("%.1f %%", 100.0 * static_cast<double>(report.eight_bit_blocks()) /
                                          static_cast<double>(std::max<int64_t>(1, report.blocks()))),
           absl::StrFormat("%d of %d activation blocks in 8 bits", report.eight_bit_blocks(), report.blocks())));
  return out + "</div>\n";
}

// Layers down, linears across; the darker the cell, the larger its output error.
std::string Errors(const QuantizationReport& report) {
  double largest = 0;
  for (const LayerReport& layer : report.layers) {
    for (const LinearReport& linear : layer.linears) largest = std::max(largest, linear.output_error.value_or(0));
  }
  std::string out = "<h2>Error of every linear</h2>\n";
  if (largest == 0) return out + "<p>The quantizer that made this model recorded no errors.</p>\n";
  absl::StrAppend(&out,
                  "<p>Large: relative error of the outputs that rounding the weights makes on calibration inputs, in "
                  "percent. Small: relative error of the weights themselves. Error-compensating rounding trades the "
                  "second for the first.</p>\n<div class=\"scroll\"><table><tr><th class=\"name\">layer</th>");
  for (const LinearReport& linear : report.layers.front().linears)
    absl::StrAppend(&out, "<th>", linear.name, "</th>");
  absl::StrAppend(&out, "</tr>\n");
  for (size_t i = 0; i < report.layers.size(); ++i) {
    absl::StrAppend(&out, "<tr><td class=\"name\">", i, "</td>");
    for (const LinearReport& linear : report.layers[i].linears) {
      if (!linear.output_error || !linear.weight_error) {
        absl::StrAppend(&out, "<td>–</td>");
        continue;
      }
      absl::StrAppendFormat(
          &out,
          "<td style=\"background:color-mix(in srgb,var(--accent) %.0f%%,var(--surface))\"%s>%.1f<small>%.1f</small></td>",
          60 * *linear.output_error / largest,
          linear.fallback.empty() ? "" : absl::StrCat(" title=\"", Escape(linear.fallback), "\""),
          100 * *linear.output_error, 100 * *linear.weight_error);
    }
    absl::StrAppend(&out, "</tr>\n");
  }
  return out + "</table></div>\n";
}

// Bars from the median channel (the base line) up, on a logarithmic scale shared by the page.
std::string Bars(const std::vector<float>& values, double top, const char* style, double width) {
  std::string out;
  const double step = width / static_cast<double>(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const double height = kCellHeight * std::log2(std::max(1.0, static_cast<double>(values[i]))) / std::log2(top);
    if (height < 0.5) continue;
    absl::StrAppendFormat(&out, "<rect class=\"%s\" x=\"%.1f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\"/>", style,
                          static_cast<double>(i) * step, kCellHeight - height, std::max(0.7, step - 0.3), height);
  }
  return out;
}

std::string Outliers(const QuantizationReport& report) {
  if (!report.divergence) return "";
  std::vector<size_t> layers(report.layers.size());
  std::iota(layers.begin(), layers.end(), size_t{0});
  const auto peak = [&](size_t layer) {
    double largest = 2;
    for (const InputReport& input : report.layers[layer].inputs)
      largest = std::max({largest, input.before_peak, input.after_peak});
    return largest;
  };
  std::ranges::stable_sort(layers, [&](size_t a, size_t b) { return peak(a) > peak(b); });
  const double top = peak(layers.front());
  layers.resize(std::min(layers.size(), kPictureLayers));
  std::ranges::sort(layers);

  constexpr double kRow = kCellHeight + 40, kColumn = kCellWidth + 32, kLeft = 30, kTop = 18;
  std::string out = absl::StrFormat(
      "<h2>Outliers, before and after</h2>\n<p>Largest magnitude of each input channel, relative to the median channel "
      "(the base line), logarithmic up to %.0f×. Grey: the float model. Colour: what the quantized model multiplies, "
      "after its transforms and in the order of its codes.%s</p>\n<div class=\"scroll\">"
      "<svg width=\"%.0f\" height=\"%.0f\" role=\"img\" aria-label=\"Channel magnitudes\">\n",
      top, layers.size() < report.layers.size() ? " The layers with the largest outliers are shown." : "",
      kLeft + 4 * kColumn, kTop + static_cast<double>(layers.size()) * kRow);
  for (size_t j = 0; j < report.layers.front().inputs.size(); ++j) {
    absl::StrAppendFormat(&out, "<text class=\"ink\" x=\"%.0f\" y=\"11\">%s</text>", kLeft + static_cast<double>(j) * kColumn,
                          report.layers.front().inputs[j].name);
  }
  for (size_t row = 0; row < layers.size(); ++row) {
    const double y = kTop + static_cast<double>(row) * kRow;
    absl::StrAppendFormat(&out, "<text class=\"ink\" x=\"0\" y=\"%.0f\">%d</text>\n", y + kCellHeight, layers[row]);
    for (size_t j = 0; j < report.layers[layers[row]].inputs.size(); ++j) {
      const InputReport& input = report.layers[layers[row]].inputs[j];
      const double half = kCellWidth / 2 - 4;
      absl::StrAppendFormat(&out, "<g transform=\"translate(%.0f %.0f)\">", kLeft + static_cast<double>(j) * kColumn, y);
      absl::StrAppend(&out, Bars(input.before, top, "before", half));
      absl::StrAppendFormat(&out, "<g transform=\"translate(%.0f 0)\">%s</g>", half + 8,
                            Bars(input.after, top, "after", half));
      absl::StrAppendFormat(&out,
                            "<path d=\"M0 %.1fH%.0fM%.0f %.1fH%.0f\" stroke=\"var(--muted)\" stroke-width=\".7\"/>"
                            "<text x=\"0\" y=\"%.0f\">%.1f×</text><text x=\"%.0f\" y=\"%.0f\">%.1f×</text></g>\n",
                            kCellHeight, half, half + 8, kCellHeight, kCellWidth, kCellHeight + 15, input.before_peak,
                            half + 8, kCellHeight + 15, input.after_peak);
    }
  }
  return out + "</svg></div>\n";
}

std::string Blocks(const QuantizationReport& report) {
  std::string out =
      "<h2>Blocks in eight bits</h2>\n<p>Every input is cut in blocks of 128 channels; a filled square codes in 8 bits, "
      "an open one in 4.</p>\n<div class=\"scroll\"><table><tr><th class=\"name\">layer</th>";
  for (const InputReport& input : report.layers.front().inputs)
    absl::StrAppend(&out, "<th class=\"name\">", input.name, "</th>");
  absl::StrAppend(&out, "</tr>\n");
  for (size_t i = 0; i < report.layers.size(); ++i) {
    absl::StrAppend(&out, "<tr><td class=\"name\">", i, "</td>");
    for (const InputReport& input : report.layers[i].inputs) {
      const size_t blocks = input.block_bits.size();
      const bool squares = blocks <= kSquares;
      const double width = squares ? 13.0 * static_cast<double>(blocks) : 160;
      absl::StrAppendFormat(&out, "<td class=\"name\"><svg width=\"%.0f\" height=\"13\">", width + 62);
      if (squares) {
        for (size_t b = 0; b < blocks; ++b) {
          absl::StrAppendFormat(&out, "<rect class=\"%s\" x=\"%.1f\" y=\"1.5\" width=\"10\" height=\"10\"/>",
                                input.block_bits[b] == 8 ? "block8" : "block", 0.5 + 13.0 * static_cast<double>(b));
        }
      } else {
        absl::StrAppendFormat(&out,
                              "<rect class=\"block\" x=\".5\" y=\"1.5\" width=\"%.0f\" height=\"10\"/>"
                              "<rect class=\"block8\" x=\".5\" y=\"1.5\" width=\"%.1f\" height=\"10\"/>",
                              width - 2,
                              (width - 2) * static_cast<double>(input.eight_bit_blocks()) / static_cast<double>(blocks));
      }
      absl::StrAppendFormat(&out, "<text x=\"%.0f\" y=\"11\">%d of %d</text></svg></td>", width + 6,
                            input.eight_bit_blocks(), blocks);
    }
    absl::StrAppend(&out, "</tr>\n");
  }
  return out + "</table></div>\n";
}

std::string Sizes(const QuantizationReport& report) {
  const double largest = static_cast<double>(std::max(report.float_bytes(), report.quantized_bytes()));
  constexpr double kBar = 560, kLabel = 150;
  std::string out = "<h2>Bytes</h2>\n<p>Grey: float. Colour: quantized.</p>\n<div class=\"scroll\"><svg width=\"860\" height=\"";
  absl::StrAppendFormat(&out, "%d\" role=\"img\" aria-label=\"Bytes of tensors\">\n", 44 * report.sizes.size());
  for (size_t i = 0; i < report.sizes.size(); ++i) {
    const QuantizationReport::Size& size = report.sizes[i];
    const double y = 44.0 * static_cast<double>(i);
    absl::StrAppendFormat(&out, "<text class=\"ink\" x=\"0\" y=\"%.0f\">%s</text>", y + 20, size.part);
    const auto bar = [&](int64_t bytes, const char* style, double at) {
      const double width = std::max(1.0, kBar * static_cast<double>(bytes) / largest);
      absl::StrAppendFormat(&out,
                            "<rect class=\"%s\" x=\"%.0f\" y=\"%.0f\" width=\"%.1f\" height=\"13\"/>"
                            "<text x=\"%.1f\" y=\"%.0f\">%s</text>",
                            style, kLabel, at, width, kLabel + width + 6, at + 11, Megabytes(bytes));
    };
    bar(size.float_bytes, "before", y + 2);
    bar(size.quantized_bytes, "after", y + 18);
  }
  return out + "\n</svg></div>\n";
}

std::string Settings(const QuantizationReport& report) {
  std::string out = "<h2>Settings</h2>\n<p>As the checkpoint records them.</p>\n<table class=\"settings\">\n";
  for (const auto& [name, value] : report.settings)
    absl::StrAppend(&out, "<tr><td>", Escape(name), "</td><td>", Escape(value), "</td></tr>\n");
  return out + "</table>\n";
}

}  // namespace

std::string ReportHtml(const QuantizationReport& report) {
  const std::string title = Escape(absl::StrCat(report.quantized, " · ", report.mode));
  std::string intro = absl::StrFormat("Quantized from %s, %.1f M parameters.", Escape(report.model),
                                      static_cast<double>(report.parameters) / 1e6);
  if (report.divergence) {
    absl::StrAppendFormat(&intro, " Both models read %d tokens in windows of %d through the engine that serves.",
                          report.divergence->tokens, report.window);
  }
  return absl::StrCat(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" "
      "content=\"light dark\"><title>",
      title, "</title><style>", kStyle, "</style></head>\n<body>\n<h1>", title, "</h1>\n<p>", intro, "</p>\n",
      Tiles(report), Errors(report), Outliers(report), Blocks(report), Sizes(report), Settings(report),
      "</body></html>\n");
}

}  // namespace nibble
