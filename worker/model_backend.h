// The backend that computes: a checkpoint, the operators of this machine, the model and its engine.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/model/checkpoint.h"
#include "common/model/config.h"
#include "worker/backend.h"

namespace nibble {

struct ModelBackendOptions {
  std::string backend = "cpu";  // "cpu", "cuda", or "auto": cuda when this build and machine have it
  int threads = 0;              // of the CPU backend; 0: this machine's, shared evenly by the ranks of the group
  int device = 0;               // CUDA ordinal
  std::string advertise_host = "127.0.0.1";
  std::chrono::milliseconds collective_timeout{5000};
};

// Opens and validates the checkpoint and finds the device now; loads weights in Load. Errors name file, tensor and
// reason.
absl::StatusOr<std::unique_ptr<Backend>> MakeModelBackend(const std::string& model_dir,
                                                          const ModelBackendOptions& options);

// What GetInfo says of a model. Without tensors (a mock needs none) the fingerprint is empty.
v1::ModelInfo DescribeModel(const ModelConfig& config, const std::string& fingerprint);

}  // namespace nibble
