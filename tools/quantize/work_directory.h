// What a quantization has finished so far, on disk, so that an interrupted run continues: "OUTPUT.work" beside the
// output holds, each a directory that appears whole or not at all,
//   run.json      what is being made, of what; a run with other options does not continue it
//   basis         the residual's basis, when it took a survey
//   layer-I       a quantized layer
//   hidden-I      the calibration text's hidden states before layer I; only the newest is kept
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/safetensors.h"
#include "common/model/writer.h"
#include "nlohmann/json.hpp"

namespace nibble {

class WorkDirectory {
 public:
  // Creates `path`, or with `resume` opens it if it is there. `run` identifies the run. FAILED_PRECONDITION when it is
  // there and resume is off, or is of another run (the message names the first field that differs); errors of the file
  // system with path and reason.
  static absl::StatusOr<WorkDirectory> Open(const std::string& path, const nlohmann::json& run, bool resume);

  // Layers 0..n-1 are there, and (but for n = 0) the hidden states before layer n.
  int64_t layers_done() const { return layers_done_; }

  // f32 values under a name ("basis"); empty when there are none.
  absl::Status SaveValues(const std::string& name, std::span<const float> values);
  absl::StatusOr<std::vector<float>> LoadValues(const std::string& name) const;

  // Hidden states before layer layers_done(); empty before the first has been done.
  absl::StatusOr<std::vector<float>> LoadHidden() const;

  struct Tensor {
    TensorSpec spec;
    std::span<const uint8_t> data;
  };
  // Layer layers_done(), its record (any JSON) and the hidden states behind it; then counts as done.
  absl::Status SaveLayer(std::span<const Tensor> tensors, const nlohmann::json& record, std::span<const float> hidden);
  absl::StatusOr<std::unique_ptr<SafeTensors>> LoadLayer(int64_t layer) const;
  absl::StatusOr<nlohmann::json> LoadRecord(int64_t layer) const;

  absl::Status Remove();

 private:
  explicit WorkDirectory(std::string path) : path_(std::move(path)) {}
  std::string Part(const std::string& name, int64_t layer) const;

  std::string path_;
  int64_t layers_done_ = 0;
};

}  // namespace nibble
