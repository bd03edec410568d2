#include "tools/bench/workload.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "absl/strings/str_cat.h"
#include "common/base/file.h"
#include "common/base/status.h"

namespace nibble {
namespace {

constexpr int64_t kMaxDatasetBytes = int64_t{256} << 20;
constexpr int64_t kMaxLength = 1 << 24;  // tokens; a model's context is smaller, and the server says so
constexpr uint64_t kPrefixStream = std::numeric_limits<uint64_t>::max();

// SplitMix64 (Steele, Lea, Flood 2014): a good 64-bit hash, so that a token depends on nothing but its place.
uint64_t Mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// The first of `names` that the object has, as a length.
absl::StatusOr<int64_t> Length(const nlohmann::json& object, std::initializer_list<const char*> names,
                               int64_t fallback) {
  for (const char* name : names) {
    const auto it = object.find(name);
    if (it == object.end()) continue;
    if (!it->is_number_integer() || it->get<double>() < 1 || it->get<double>() > static_cast<double>(kMaxLength)) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", it->dump(), ", must be 1..", kMaxLength));
    }
    return it->get<int64_t>();
  }
  return fallback;
}

absl::StatusOr<DatasetEntry> ParseEntry(const std::string& line, int64_t default_output_len) {
  const nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InvalidArgumentError("not a JSON object");
  DatasetEntry entry;
  NIBBLE_ASSIGN_OR_RETURN(entry.input_len, Length(object, {"input_len", "prompt_len"}, 0));
  NIBBLE_ASSIGN_OR_RETURN(entry.output_len,
                          Length(object, {"output_len", "output_tokens", "max_tokens"}, default_output_len));
  if (const auto it = object.find("prompt"); it != object.end()) {
    if (!it->is_string()) return absl::InvalidArgumentError("prompt must be a string");
    entry.prompt = it->get<std::string>();
  }
  if (const auto it = object.find("token_ids"); it != object.end()) {
    if (!it->is_array()) return absl::InvalidArgumentError("token_ids must be a list");
    for (const nlohmann::json& id : *it) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<uint32_t>::max()) {
        return absl::InvalidArgumentError(absl::StrCat("token_ids has ", id.dump(), ", must be token ids"));
      }
      entry.token_ids.push_back(id.get<uint32_t>());
    }
  }
  if ((entry.input_len > 0) + !entry.prompt.empty() + !entry.token_ids.empty() != 1) {
    return absl::InvalidArgumentError("needs exactly one of input_len, prompt and token_ids");
  }
  return entry;
}

}  // namespace

absl::StatusOr<std::vector<DatasetEntry>> ParseDataset(const std::string& text, int64_t default_output_len) {
  std::vector<DatasetEntry> entries;
  size_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto entry = ParseEntry(line, default_output_len);
    if (!entry.ok()) return Annotate(entry.status(), "line " + std::to_string(number));
    entries.push_back(*std::move(entry));
  }
  if (entries.empty()) return absl::InvalidArgumentError("no lines");
  return entries;
}

std::vector<double> ArrivalTimes(int64_t num_requests, double request_rate, double burstiness, uint64_t seed) {
  std::vector<double> times(static_cast<size_t>(num_requests), 0.0);
  if (!std::isfinite(request_rate)) return times;
  std::mt19937_64 random(seed);
  std::gamma_distribution<double> gap(burstiness, 1 / (request_rate * burstiness));
  double now = 0;
  for (double& time : times) time = now += gap(random);
  const double scale = now > 0 ? static_cast<double>(num_requests) / request_rate / now : 0;
  for (double& time : times) time *= scale;
  return times;
}

absl::StatusOr<Workload> Workload::Make(const WorkloadOptions& options, const v1::GetModelInfoResponse& model) {
  if (options.prefix_len > options.input_len) {
    return absl::InvalidArgumentError(
        absl::StrCat("prefix-len is ", options.prefix_len, ", must be at most input-len ", options.input_len));
  }
  Workload workload;
  workload.options_ = options;
  workload.vocab_size_ = model.vocab_size();
  workload.forbidden_.assign(model.eos_token_ids().begin(), model.eos_token_ids().end());
  if (model.has_bos_token_id()) workload.forbidden_.push_back(model.bos_token_id());
  std::erase_if(workload.forbidden_, [&](uint32_t id) { return id >= model.vocab_size(); });
  std::sort(workload.forbidden_.begin(), workload.forbidden_.end());
  workload.forbidden_.erase(std::unique(workload.forbidden_.begin(), workload.forbidden_.end()),
                            workload.forbidden_.end());
  if (workload.vocab_size_ <= workload.forbidden_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("the server's vocabulary has ", model.vocab_size(), " tokens"));
  }
  if (!options.dataset_file.empty()) {
    NIBBLE_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(options.dataset_file, kMaxDatasetBytes));
    auto dataset = ParseDataset(text, options.output_len);
    if (!dataset.ok()) return Annotate(dataset.status(), options.dataset_file);
    workload.dataset_ = *std::move(dataset);
  }
  workload.arrivals_s_ =
      ArrivalTimes(options.num_requests, options.request_rate, options.burstiness, Mix(options.seed));
  return workload;
}

uint32_t Workload::RandomToken(uint64_t stream, uint64_t position) const {
  const uint64_t hash = Mix(Mix(options_.seed) ^ Mix(stream) ^ (position * 0xD1342543DE82EF95ull));
  // A number below the count of allowed ids, stepped over the forbidden ones: every allowed id is equally likely.
  uint32_t id = static_cast<uint32_t>(hash % (vocab_size_ - forbidden_.size()));
  for (const uint32_t forbidden : forbidden_) id += id >= forbidden;
  return id;
}

v1::GenerateRequest Workload::Request(int64_t i) const {
  const DatasetEntry random{.input_len = options_.input_len, .output_len = options_.output_len};
  const DatasetEntry& entry = dataset_.empty() ? random : dataset_[static_cast<size_t>(i) % dataset_.size()];

  v1::GenerateRequest request;
  if (!entry.prompt.empty()) {
    request.set_text(entry.prompt);
  } else {
    auto* ids = request.mutable_tokenized()->mutable_input_ids();
    ids->Assign(entry.token_ids.begin(), entry.token_ids.end());
    for (int64_t t = 0; t < entry.input_len; ++t) {
      const uint64_t stream = t < options_.prefix_len ? kPrefixStream : static_cast<uint64_t>(i);
      ids->Add(RandomToken(stream, static_cast<uint64_t>(t)));
    }
  }
  v1::SamplingParams* params = request.mutable_sampling_params();
  params->set_max_tokens(static_cast<uint32_t>(entry.output_len));
  params->set_temperature(static_cast<float>(options_.temperature));
  params->set_ignore_eos(options_.ignore_eos);
  params->set_seed(options_.seed + static_cast<uint64_t>(i));
  return request;
}

}  // namespace nibble
