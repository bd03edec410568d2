#include "common/model/writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;

int64_t BytesOf(const TensorSpec& spec) {
  int64_t bytes = SizeOf(spec.type);
  for (const int64_t size : spec.shape) {
    NIBBLE_CHECK_GE(size, 0);
    NIBBLE_CHECK(!__builtin_mul_overflow(bytes, size, &bytes), spec.name);
  }
  return bytes;
}

absl::Status WriteAll(int fd, const std::string& path, std::span<const uint8_t> data, int64_t offset) {
  size_t done = 0;
  while (done < data.size()) {
    const ssize_t wrote =
        ::pwrite(fd, data.data() + done, data.size() - done, static_cast<off_t>(offset + static_cast<int64_t>(done)));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return FileError(errno, absl::StrCat("write ", data.size(), " bytes to"), path);
    done += static_cast<size_t>(wrote);
  }
  return absl::OkStatus();
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return FileError(errno, "open", path);
  const int result = ::fsync(fd), error = errno;
  ::close(fd);
  return result == 0 ? absl::OkStatus() : FileError(error, "sync", path);
}

// A header: its length, then JSON padded with spaces so that data begins at a multiple of 8.
std::string HeaderBytes(const std::vector<const TensorSpec*>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorSpec* spec : tensors) {
    const int64_t end = offset + BytesOf(*spec);
    header[spec->name] = {
        {"dtype", TensorTypeName(spec->type)}, {"shape", spec->shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[static_cast<size_t>(i)] = static_cast<char>(text.size() >> (8 * i) & 0xff);
  return out + text;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelWriter>> ModelWriter::Create(const std::string& dir,
                                                                 std::vector<TensorSpec> tensors,
                                                                 const ModelWriterOptions& options) {
  std::unique_ptr<ModelWriter> writer(new ModelWriter);
  writer->dir_ = dir;
  while (writer->dir_.size() > 1 && writer->dir_.back() == '/') writer->dir_.pop_back();
  writer->options_ = options;
  NIBBLE_RETURN_IF_ERROR(writer->CheckTarget());

  const std::string parent = fs::path(writer->dir_).parent_path();
  std::error_code error;
  if (!parent.empty() && !fs::create_directories(parent, error) && error) {
    return FileError(error.value(), "create directory", parent);
  }
  std::string name = writer->dir_ + ".partial-XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) return FileError(errno, "create directory", name);
  writer->partial_ = name;
  if (::chmod(name.c_str(), 0755) != 0) return FileError(errno, "chmod", name);
  NIBBLE_RETURN_IF_ERROR(writer->CreateShards(tensors));
  return writer;
}

ModelWriter::~ModelWriter() { Discard().IgnoreError(); }

absl::Status ModelWriter::Discard() {
  for (Shard& shard : shards_) {
    if (shard.fd >= 0) ::close(shard.fd);
    shard.fd = -1;
  }
  if (partial_.empty()) return absl::OkStatus();
  std::error_code error;
  fs::remove_all(std::exchange(partial_, ""), error);
  return error ? FileError(error.value(), "remove", dir_) : absl::OkStatus();
}

absl::Status ModelWriter::CheckTarget() const {
  std::error_code error;
  const fs::file_status status = fs::symlink_status(dir_, error);
  if (!fs::exists(status)) return absl::OkStatus();
  if (!options_.overwrite) {
    return absl::AlreadyExistsError(absl::StrCat(dir_, " exists; it is replaced only when asked to"));
  }
  bool is_model = fs::is_directory(status) && fs::exists(fs::path(dir_) / "config.json", error);
  if (is_model) {
    for (fs::directory_iterator it(dir_, error), end; !error && it != end; it.increment(error)) {
      is_model = is_model && it->symlink_status(error).type() == fs::file_type::regular;
    }
  }
  if (error || !is_model) {
    return absl::FailedPreconditionError(absl::StrCat(
        dir_, " is not a directory of plain files with a config.json; only a model directory is replaced"));
  }
  return absl::OkStatus();
}

absl::Status ModelWriter::CreateShards(const std::vector<TensorSpec>& tensors) {
  std::vector<std::vector<const TensorSpec*>> groups(1);
  std::set<std::string> names;
  int64_t group_bytes = 0;
  for (const TensorSpec& spec : tensors) {
    NIBBLE_CHECK(names.insert(spec.name).second, "tensor declared twice: " + spec.name);
    const int64_t bytes = BytesOf(spec);
    if (!groups.back().empty() && group_bytes + bytes > options_.max_shard_bytes) {
      groups.emplace_back();
      group_bytes = 0;
    }
    groups.back().push_back(&spec);
    group_bytes += bytes;
    total_bytes_ += bytes;
  }

  nlohmann::json weight_map = nlohmann::json::object();
  for (size_t g = 0; g < groups.size(); ++g) {
    const std::string file_name = groups.size() == 1
                                      ? "model.safetensors"
                                      : absl::StrFormat("model-%05d-of-%05d.safetensors", g + 1, groups.size());
    Shard shard{.path = partial_ + "/" + file_name};
    shard.fd = ::open(shard.path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (shard.fd < 0) return FileError(errno, "create", shard.path);
    shards_.push_back(shard);

    const std::string header = HeaderBytes(groups[g], options_.metadata);
    int64_t offset = static_cast<int64_t>(header.size());
    for (const TensorSpec* spec : groups[g]) {
      places_[spec->name] = {.shard = g, .offset = offset, .bytes = BytesOf(*spec)};
      offset += BytesOf(*spec);
      weight_map[spec->name] = file_name;
    }
    if (const int error = ::posix_fallocate(shard.fd, 0, static_cast<off_t>(offset)); error != 0) {
      return FileError(error, absl::StrCat("reserve ", offset, " bytes for"), dir_ + "/" + file_name);
    }
    NIBBLE_RETURN_IF_ERROR(
        WriteAll(shard.fd, shard.path, std::span(reinterpret_cast<const uint8_t*>(header.data()), header.size()), 0));
  }
  if (groups.size() == 1) return absl::OkStatus();
  const nlohmann::json index = {{"metadata", {{"total_size", total_bytes_}}}, {"weight_map", weight_map}};
  return WriteFile("model.safetensors.index.json", index.dump(2) + "\n");
}

absl::Status ModelWriter::Write(const std::string& name, std::span<const uint8_t> data) {
  const auto it = places_.find(name);
  NIBBLE_CHECK(it != places_.end(), "tensor was not declared: " + name);
  Place& place = it->second;
  NIBBLE_CHECK(!place.written, "tensor written twice: " + name);
  NIBBLE_CHECK_EQ(static_cast<int64_t>(data.size()), place.bytes);
  const Shard& shard = shards_[place.shard];
  NIBBLE_RETURN_IF_ERROR(WriteAll(shard.fd, shard.path, data, place.offset));
  place.written = true;
  return absl::OkStatus();
}

absl::Status ModelWriter::WriteFile(const std::string& file_name, std::string_view contents) {
  NIBBLE_CHECK(!file_name.empty() && file_name.find('/') == std::string::npos, file_name);
  const std::string path = partial_ + "/" + file_name;
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return FileError(errno, "create", path);
  absl::Status status =
      WriteAll(fd, path, std::span(reinterpret_cast<const uint8_t*>(contents.data()), contents.size()), 0);
  if (status.ok() && ::fsync(fd) != 0) status = FileError(errno, "sync", path);
  if (::close(fd) != 0 && status.ok()) status = FileError(errno, "close", path);
  return status;
}

absl::Status ModelWriter::Commit() {
  for (const auto& [name, place] : places_) NIBBLE_CHECK(place.written, "tensor declared, not written: " + name);
  for (Shard& shard : shards_) {
    if (::fsync(shard.fd) != 0) return FileError(errno, "sync", shard.path);
    if (::close(std::exchange(shard.fd, -1)) != 0) return FileError(errno, "close", shard.path);
  }
  NIBBLE_RETURN_IF_ERROR(SyncDirectory(partial_));
  NIBBLE_RETURN_IF_ERROR(CheckTarget());  // again: time has passed since Create

  std::error_code error;
  const std::string parent = fs::absolute(dir_, error).parent_path().string();
  if (::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, dir_.c_str(), RENAME_NOREPLACE) == 0 ||
      (errno == EINVAL && ::rename(partial_.c_str(), dir_.c_str()) == 0)) {  // EINVAL: NFS knows no flags
    partial_.clear();
    return SyncDirectory(parent);
  }
  if ((errno != EEXIST && errno != ENOTEMPTY) || !options_.overwrite) {
    return FileError(errno, "rename the finished model to", dir_);
  }
  // Exchanged in one step where the file system can: at no moment is the name missing. The old model then lies under
  // the temporary name.
  if (::renameat2(AT_FDCWD, partial_.c_str(), AT_FDCWD, dir_.c_str(), RENAME_EXCHANGE) != 0) {
    const std::string old = partial_ + ".old";
    if (errno != EINVAL || ::rename(dir_.c_str(), old.c_str()) != 0 || ::rename(partial_.c_str(), dir_.c_str()) != 0) {
      return FileError(errno, "rename the finished model to", dir_);
    }
    partial_ = old;
  }
  NIBBLE_RETURN_IF_ERROR(SyncDirectory(parent));
  return Discard();
}

}  // namespace nibble
