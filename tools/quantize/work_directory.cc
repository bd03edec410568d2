#include "tools/quantize/work_directory.h"

#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

constexpr char kRunFile[] = "run.json";
constexpr char kRecordFile[] = "record.json";
constexpr char kValues[] = "values";

template <typename T>
std::span<const uint8_t> Bytes(std::span<const T> values) {
  return {reinterpret_cast<const uint8_t*>(values.data()), values.size_bytes()};
}

absl::Status RemoveAll(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  return error ? FileError(error.value(), "remove", path) : absl::OkStatus();
}

// A directory of tensors and perhaps a record, in place of what an interrupted run left under the name.
absl::Status WritePart(const std::string& path, std::span<const WorkDirectory::Tensor> tensors,
                       const std::string& record) {
  NIBBLE_RETURN_IF_ERROR(RemoveAll(path));
  std::vector<TensorSpec> specs;
  for (const auto& tensor : tensors) specs.push_back(tensor.spec);
  NIBBLE_ASSIGN_OR_RETURN(const auto writer, ModelWriter::Create(path, std::move(specs), {}));
  for (const auto& tensor : tensors) NIBBLE_RETURN_IF_ERROR(writer->Write(tensor.spec.name, tensor.data));
  if (!record.empty()) NIBBLE_RETURN_IF_ERROR(writer->WriteFile(kRecordFile, record));
  return writer->Commit();
}

absl::Status WriteValues(const std::string& path, std::span<const float> values) {
  const WorkDirectory::Tensor tensor = {.spec = {kValues, TensorType::kF32, {static_cast<int64_t>(values.size())}},
                                        .data = Bytes(values)};
  return WritePart(path, std::span(&tensor, 1), "");
}

absl::StatusOr<std::vector<float>> ReadValues(const std::string& path) {
  NIBBLE_ASSIGN_OR_RETURN(const auto tensors, SafeTensors::Open(path));
  NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors->Get(kValues));
  if (view.type != TensorType::kF32) return absl::InvalidArgumentError(absl::StrCat(path, ": values are not F32"));
  std::vector<float> values(static_cast<size_t>(view.bytes) / sizeof(float));
  std::memcpy(values.data(), view.data, static_cast<size_t>(view.bytes));
  return values;
}

}  // namespace

absl::StatusOr<WorkDirectory> WorkDirectory::Open(const std::string& path, const nlohmann::json& run, bool resume) {
  WorkDirectory work(path);
  std::error_code error;
  if (!fs::exists(path, error)) {
    if (!fs::create_directories(path, error)) return FileError(error.value(), "create directory", path);
    NIBBLE_RETURN_IF_ERROR(WriteFileAtomically(path + "/" + kRunFile, run.dump(2) + "\n"));
    return work;
  }
  if (!resume) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " holds an interrupted run; continue it with --resume, or delete it"));
  }
  NIBBLE_ASSIGN_OR_RETURN(const nlohmann::json found, ReadJsonObject(path + "/" + kRunFile));
  for (const auto& [name, value] : run.items()) {
    if (found.contains(name) && found[name] == value) continue;
    return absl::FailedPreconditionError(absl::StrCat(path, " is of another run: ", name, " was ",
                                                      Quoted(found.value(name, nlohmann::json()).dump()), ", is ",
                                                      Quoted(value.dump())));
  }
  while (fs::exists(work.Part("layer", work.layers_done_), error) &&
         fs::exists(work.Part("layer", work.layers_done_) + "/" + kRecordFile, error)) {
    ++work.layers_done_;
  }
  // A layer counts once the hidden states behind it are there.
  while (work.layers_done_ > 0 && !fs::exists(work.Part("hidden", work.layers_done_), error)) --work.layers_done_;
  return work;
}

std::string WorkDirectory::Part(const std::string& name, int64_t layer) const {
  return absl::StrCat(path_, "/", name, "-", layer);
}

absl::Status WorkDirectory::SaveValues(const std::string& name, std::span<const float> values) {
  return WriteValues(path_ + "/" + name, values);
}

absl::StatusOr<std::vector<float>> WorkDirectory::LoadValues(const std::string& name) const {
  std::error_code error;
  if (!fs::exists(path_ + "/" + name, error)) return std::vector<float>();
  return ReadValues(path_ + "/" + name);
}

absl::StatusOr<std::vector<float>> WorkDirectory::LoadHidden() const {
  std::error_code error;
  if (!fs::exists(Part("hidden", layers_done_), error)) return std::vector<float>();
  return ReadValues(Part("hidden", layers_done_));
}

absl::Status WorkDirectory::SaveLayer(std::span<const Tensor> tensors, const nlohmann::json& record,
                                      std::span<const float> hidden) {
  NIBBLE_RETURN_IF_ERROR(WritePart(Part("layer", layers_done_), tensors, record.dump(1) + "\n"));
  NIBBLE_RETURN_IF_ERROR(WriteValues(Part("hidden", layers_done_ + 1), hidden));
  NIBBLE_RETURN_IF_ERROR(RemoveAll(Part("hidden", layers_done_)));
  ++layers_done_;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<SafeTensors>> WorkDirectory::LoadLayer(int64_t layer) const {
  return SafeTensors::Open(Part("layer", layer));
}

absl::StatusOr<nlohmann::json> WorkDirectory::LoadRecord(int64_t layer) const {
  return ReadJsonObject(Part("layer", layer) + "/" + kRecordFile);
}

absl::Status WorkDirectory::Remove() { return RemoveAll(path_); }

}  // namespace nibble
