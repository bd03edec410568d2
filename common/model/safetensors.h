// Reads a checkpoint's *.safetensors: one file, or shards named by model.safetensors.index.json. Files are mapped, not
// read. Every header field is validated against the file's size before any pointer is handed out.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble {

enum class TensorType : uint8_t { kF32, kF16, kBF16, kU8, kI8, kI32, kI64 };
int64_t SizeOf(TensorType type);
const char* TensorTypeName(TensorType type);

// A tensor in mapped memory. Pointers live as long as the SafeTensors object. Data may be unaligned.
struct TensorView {
  TensorType type = TensorType::kBF16;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  int64_t bytes = 0;
};

class SafeTensors {
 public:
  static absl::StatusOr<std::unique_ptr<SafeTensors>> Open(const std::string& dir);
  ~SafeTensors();

  bool Has(const std::string& name) const;
  // NOT_FOUND with directory and name; INVALID_ARGUMENT when type or shape differ from what the caller needs.
  absl::StatusOr<TensorView> Get(const std::string& name) const;
  absl::StatusOr<TensorView> Get(const std::string& name, TensorType type, std::span<const int64_t> shape) const;
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }

 private:
  SafeTensors() = default;
  struct Mapping;
  std::vector<std::unique_ptr<Mapping>> files_;
  std::map<std::string, TensorView> tensors_;
};

}  // namespace nibble
