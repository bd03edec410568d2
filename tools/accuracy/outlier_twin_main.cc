// nibble-outlier-twin: a model in, the same function with outliers out.
#include <CLI/CLI.hpp>
#include <iostream>

#include "common/base/version.h"
#include "tools/accuracy/outlier_twin.h"

int main(int argc, char** argv) {
  nibble::OutlierOptions options;
  CLI::App app("Writes a model that computes the same function and has the activation outliers of large models.");
  app.set_version_flag("--version", nibble::kVersion);
  app.add_option("--model", options.model, "Unquantized model directory")->required();
  app.add_option("--output", options.output, "Directory to create")->required();
  app.add_flag("--force", options.overwrite, "Replace an existing output (only ever a model directory)");
  app.add_option("--seed", options.seed, "Which channels, and by how much")->capture_default_str();
  app.add_option("--channels", options.channels, "Outlier channels of each norm and up_proj")->capture_default_str();
  app.add_option("--factor", options.factor, "Mean size of an outlier; 0.5 to 1.5 times it")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (const absl::Status status = nibble::WriteOutlierTwin(options); !status.ok()) {
    std::cerr << "nibble-outlier-twin: " << status.message() << "\n";
    return 1;
  }
  return 0;
}
