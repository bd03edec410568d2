// Writes a model directory so that it appears whole or not at all: into a temporary sibling, synced, then renamed. An
// error, or an object destroyed before Commit, leaves nothing behind. (A killed process leaves "NAME.partial-XXXXXX",
// which may be deleted.)
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/model/safetensors.h"

namespace nibble {

// A tensor to come. All are declared first, because headers stand before data and data is streamed.
struct TensorSpec {
  std::string name;
  TensorType type = TensorType::kBF16;
  std::vector<int64_t> shape;
};

struct ModelWriterOptions {
  bool overwrite = false;                      // replace an existing model directory
  int64_t max_shard_bytes = int64_t{4} << 30;  // of tensor data; one larger tensor gets a file of its own
  std::map<std::string, std::string> metadata = {{"format", "pt"}};  // __metadata__ of every file
};

class ModelWriter {
 public:
  // Creates the temporary directory, with missing parents, and the shards, and reserves their space, so that a full disk
  // is known at once.
  // ALREADY_EXISTS when dir exists and overwrite is off; FAILED_PRECONDITION when overwrite is on but dir is not a flat
  // directory with a config.json, that is, something other than a model would be deleted; RESOURCE_EXHAUSTED with path
  // and bytes when space is short. Tensor names must be distinct.
  static absl::StatusOr<std::unique_ptr<ModelWriter>> Create(const std::string& dir, std::vector<TensorSpec> tensors,
                                                             const ModelWriterOptions& options);
  ~ModelWriter();
  ModelWriter(const ModelWriter&) = delete;
  ModelWriter& operator=(const ModelWriter&) = delete;

  // The data of one declared tensor: exactly its size, once, in any order.
  absl::Status Write(const std::string& name, std::span<const uint8_t> data);
  template <typename T>
  absl::Status Write(const std::string& name, const std::vector<T>& values) {
    return Write(name, std::span(reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(T)));
  }
  // Another file of the directory (config.json, tokenizer.json).
  absl::Status WriteFile(const std::string& file_name, std::string_view contents);

  // Syncs everything and gives the directory its name. Every declared tensor must have been written.
  absl::Status Commit();

  int64_t total_bytes() const { return total_bytes_; }  // of tensor data

 private:
  ModelWriter() = default;
  struct Shard {
    std::string path;
    int fd = -1;
  };
  struct Place {
    size_t shard = 0;
    int64_t offset = 0;  // in the file
    int64_t bytes = 0;
    bool written = false;
  };
  absl::Status CheckTarget() const;
  absl::Status CreateShards(const std::vector<TensorSpec>& tensors);
  absl::Status Discard();

  std::string dir_;
  std::string partial_;  // the temporary directory, empty when there is none
  ModelWriterOptions options_;
  std::vector<Shard> shards_;
  std::map<std::string, Place> places_;
  int64_t total_bytes_ = 0;
};

}  // namespace nibble
