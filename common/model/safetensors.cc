// The format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, byte buffer).
// As in the reference reader, tensors must tile the byte buffer: no overlap, no hole, nothing behind the last one.
#include "common/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/json_file.h"

namespace nibble {
namespace {

using Json = nlohmann::json;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr uint64_t kMaxHeaderBytes = uint64_t{8} << 20;  // a 70B shard's header has about 20 KB
constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;
constexpr size_t kMaxShards = 4096;
constexpr size_t kMaxRank = 8;
constexpr size_t kMaxNameBytes = 512;

constexpr struct {
  TensorType type;
  const char* name;
  int64_t bytes;
} kTypes[] = {
    {TensorType::kF32, "F32", 4}, {TensorType::kF16, "F16", 2}, {TensorType::kBF16, "BF16", 2},
    {TensorType::kU8, "U8", 1},   {TensorType::kI8, "I8", 1},   {TensorType::kI32, "I32", 4},
    {TensorType::kI64, "I64", 8},
};

std::string ShapeText(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

// A non-negative int64 from JSON, or -1.
int64_t NonNegative(const Json& value) {
  if (!value.is_number_unsigned()) return -1;
  const uint64_t number = value.get<uint64_t>();
  return number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ? -1 : static_cast<int64_t>(number);
}

// A file name of an index: one path component, so that an index cannot name a file elsewhere.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

// One entry of a header. `buffer` are the bytes behind the header.
absl::StatusOr<TensorView> ParseTensor(const Json& entry, std::span<const uint8_t> buffer, int64_t* begin) {
  if (!entry.is_object()) return absl::InvalidArgumentError("is not an object");
  const auto dtype = entry.find("dtype"), shape = entry.find("shape"), offsets = entry.find("data_offsets");
  if (entry.size() != 3 || dtype == entry.end() || shape == entry.end() || offsets == entry.end()) {
    return absl::InvalidArgumentError("must have dtype, shape and data_offsets, and nothing else");
  }
  if (!dtype->is_string()) return absl::InvalidArgumentError("must have a dtype that is a string");
  TensorView view;
  const auto known =
      std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& t) { return *dtype == t.name; });
  if (known == std::end(kTypes)) {
    return absl::UnimplementedError(absl::StrCat("has dtype ", Quoted(dtype->dump(-1, ' ', true)),
                                                 "; F32, F16, BF16, U8, I8, I32 and I64 are read"));
  }
  view.type = known->type;
  if (!shape->is_array() || shape->size() > kMaxRank) {
    return absl::InvalidArgumentError(absl::StrCat("must have a shape of at most ", kMaxRank, " dimensions"));
  }
  view.bytes = known->bytes;
  for (const Json& dimension : *shape) {
    const int64_t size = NonNegative(dimension);
    if (size < 0) return absl::InvalidArgumentError("has a dimension that is not a non-negative integer");
    if (__builtin_mul_overflow(view.bytes, size, &view.bytes)) {
      return absl::InvalidArgumentError("has a shape whose size overflows 64 bits");
    }
    view.shape.push_back(size);
  }
  if (!offsets->is_array() || offsets->size() != 2) {
    return absl::InvalidArgumentError("must have data_offsets [begin, end]");
  }
  *begin = NonNegative((*offsets)[0]);
  const int64_t end = NonNegative((*offsets)[1]);
  if (*begin < 0 || end < *begin || end > static_cast<int64_t>(buffer.size())) {
    return absl::InvalidArgumentError(absl::StrCat("has data_offsets ", Quoted(offsets->dump(-1, ' ', true)),
                                                   " outside the file's ", buffer.size(), " data bytes"));
  }
  if (end - *begin != view.bytes) {
    return absl::InvalidArgumentError(absl::StrCat("has ", end - *begin, " bytes, but ", known->name, " ",
                                                   ShapeText(view.shape), " needs ", view.bytes));
  }
  view.data = buffer.data() + *begin;
  return view;
}

}  // namespace

int64_t SizeOf(TensorType type) {
  for (const auto& t : kTypes) {
    if (t.type == type) return t.bytes;
  }
  return 0;
}

const char* TensorTypeName(TensorType type) {
  for (const auto& t : kTypes) {
    if (t.type == type) return t.name;
  }
  return "unknown";
}

// A mapped file. A file truncated while mapped would raise SIGBUS: model directories are not edited under a server;
// nibble-quantize replaces them by rename, which leaves existing mappings whole.
struct SafeTensors::Mapping {
  std::string path;
  const uint8_t* data = nullptr;
  size_t bytes = 0;

  ~Mapping() {
    if (data != nullptr) ::munmap(const_cast<uint8_t*>(data), bytes);
  }

  static absl::StatusOr<std::unique_ptr<Mapping>> Open(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return FileError(errno, "open", path);
    struct stat info {};
    if (::fstat(fd, &info) != 0) {
      const int error = errno;
      ::close(fd);
      return FileError(error, "stat", path);
    }
    if (!S_ISREG(info.st_mode) || info.st_size < 10) {  // the smallest file: a length and "{}"
      ::close(fd);
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": not a regular file, or too short (", info.st_size, " bytes) to be safetensors"));
    }
    auto mapping = std::make_unique<Mapping>();
    mapping->path = path;
    mapping->bytes = static_cast<size_t>(info.st_size);
    void* data = ::mmap(nullptr, mapping->bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (data == MAP_FAILED) return FileError(error, "map", path);
    mapping->data = static_cast<const uint8_t*>(data);
    return mapping;
  }

  // All tensors of the file, validated.
  absl::StatusOr<std::map<std::string, TensorView>> Parse() const {
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | data[i];
    if (header_bytes > kMaxHeaderBytes || header_bytes > bytes - 8) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": header length ", header_bytes, " exceeds ",
                                                     std::min<uint64_t>(kMaxHeaderBytes, bytes - 8),
                                                     " bytes (truncated, or not a safetensors file)"));
    }
    const std::string_view text(reinterpret_cast<const char*>(data) + 8, header_bytes);
    if (text.empty() || text.front() != '{') {
      return absl::InvalidArgumentError(absl::StrCat(path, ": the header does not begin with '{'"));
    }
    NIBBLE_ASSIGN_OR_RETURN(const Json header, ParseJson(text, path));
    const std::span<const uint8_t> buffer(data + 8 + header_bytes, bytes - 8 - header_bytes);

    std::map<std::string, TensorView> tensors;
    std::vector<std::pair<int64_t, int64_t>> ranges;  // [begin, end)
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        if (!entry.is_object() ||
            std::any_of(entry.begin(), entry.end(), [](const Json& v) { return !v.is_string(); })) {
          return absl::InvalidArgumentError(absl::StrCat(path, ": __metadata__ must map strings to strings"));
        }
        continue;
      }
      if (name.empty() || name.size() > kMaxNameBytes) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": tensor name ", Quoted(name), " has ", name.size(),
                                                       " bytes, must have 1 to ", kMaxNameBytes));
      }
      int64_t begin = 0;
      absl::StatusOr<TensorView> view = ParseTensor(entry, buffer, &begin);
      if (!view.ok()) {
        return absl::Status(view.status().code(),
                            absl::StrCat(path, ": tensor ", Quoted(name), " ", view.status().message()));
      }
      ranges.emplace_back(begin, begin + view->bytes);
      tensors.emplace(name, *std::move(view));
    }
    std::sort(ranges.begin(), ranges.end());
    int64_t covered = 0;
    for (const auto& [begin, end] : ranges) {
      if (begin != covered) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": tensors ", begin < covered ? "overlap" : "leave a hole",
                                                       " at data offset ", std::min(begin, covered)));
      }
      covered = end;
    }
    if (covered != static_cast<int64_t>(buffer.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", buffer.size(), " data bytes, but the tensors end at ", covered));
    }
    return tensors;
  }
};

SafeTensors::~SafeTensors() = default;

absl::StatusOr<std::unique_ptr<SafeTensors>> SafeTensors::Open(const std::string& dir) {
  // As transformers does, a single file is preferred to an index.
  std::vector<std::string> names = {kSingleFile};
  std::map<std::string, std::string> placed;  // tensor → file, as the index has it
  const std::string single = dir + "/" + kSingleFile, index = dir + "/" + kIndexFile;
  if (::access(single.c_str(), F_OK) != 0) {
    if (::access(index.c_str(), F_OK) != 0) {
      return absl::NotFoundError(absl::StrCat(dir, ": has neither ", kSingleFile, " nor ", kIndexFile));
    }
    NIBBLE_ASSIGN_OR_RETURN(const Json json, ReadJsonObject(index, kMaxIndexBytes));
    const auto map = json.find("weight_map");
    if (map == json.end() || !map->is_object() || map->empty()) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": weight_map must be an object with a file per tensor"));
    }
    std::set<std::string> files;
    for (const auto& [tensor, file] : map->items()) {
      if (!file.is_string() || !IsPlainFileName(file.get_ref<const std::string&>())) {
        return absl::InvalidArgumentError(absl::StrCat(index, ": tensor ", Quoted(tensor), " is in ",
                                                       Quoted(file.dump(-1, ' ', true)),
                                                       ", must be a file name without a directory"));
      }
      files.insert(file.get<std::string>());
      placed.emplace(tensor, file.get<std::string>());
    }
    if (files.size() > kMaxShards) {
      return absl::InvalidArgumentError(absl::StrCat(index, ": names ", files.size(), " files, at most ", kMaxShards));
    }
    names.clear();
    for (const std::string& file : files) names.push_back(file);
  }

  std::unique_ptr<SafeTensors> out(new SafeTensors);
  size_t found = 0;
  for (const std::string& name : names) {
    NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Mapping> mapping, Mapping::Open(dir + "/" + name));
    NIBBLE_ASSIGN_OR_RETURN(auto tensors, mapping->Parse());
    for (auto& [tensor, view] : tensors) {
      if (!placed.empty()) {
        const auto place = placed.find(tensor);
        if (place == placed.end() || place->second != name) {
          return absl::InvalidArgumentError(
              absl::StrCat(mapping->path, ": holds tensor ", Quoted(tensor), ", which the index ",
                           place == placed.end() ? "does not name" : "places in another file"));
        }
        ++found;
      }
      out->tensors_.emplace(tensor, std::move(view));
    }
    out->files_.push_back(std::move(mapping));
  }
  if (found != placed.size()) {
    for (const auto& [tensor, file] : placed) {
      if (!out->Has(tensor)) {
        return absl::InvalidArgumentError(
            absl::StrCat(dir, "/", file, ": lacks tensor ", Quoted(tensor), ", which the index places there"));
      }
    }
  }
  return out;
}

bool SafeTensors::Has(const std::string& name) const { return tensors_.contains(name); }

absl::StatusOr<TensorView> SafeTensors::Get(const std::string& name) const {
  const auto it = tensors_.find(name);
  if (it != tensors_.end()) return it->second;
  const std::string& first = files_.front()->path;
  return absl::NotFoundError(absl::StrCat(first.substr(0, first.rfind('/')), ": has no tensor ", Quoted(name)));
}

absl::StatusOr<TensorView> SafeTensors::Get(const std::string& name, TensorType type,
                                            std::span<const int64_t> shape) const {
  NIBBLE_ASSIGN_OR_RETURN(TensorView view, Get(name));
  if (view.type != type || !std::ranges::equal(view.shape, shape)) {
    const std::string& first = files_.front()->path;
    return absl::InvalidArgumentError(absl::StrCat(first.substr(0, first.rfind('/')), ": tensor ", Quoted(name), " is ",
                                                   TensorTypeName(view.type), " ", ShapeText(view.shape), ", must be ",
                                                   TensorTypeName(type), " ", ShapeText(shape)));
  }
  return view;
}

}  // namespace nibble
