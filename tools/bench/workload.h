// What a load test sends and when. Everything is a pure function of the options: the same seed is the same test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nibble/v1/inference.pb.h"

namespace nibble {

struct WorkloadOptions {
  int64_t num_requests = 1000;
  int64_t input_len = 1024;  // tokens
  int64_t output_len = 128;  // tokens
  int64_t prefix_len = 0;    // the first tokens, of the input_len, that all prompts have in common
  double request_rate = 0;   // requests/s; infinity = all at once
  double burstiness = 1;     // gamma shape of the gaps: 1 = Poisson, smaller = bursts, larger = even
  uint64_t seed = 0;
  std::string dataset_file;  // JSONL; overrides input_len and output_len
  double temperature = 0;
  bool ignore_eos = true;  // outputs have exactly output_len tokens, so runs are comparable
};

// One line of a dataset: {"input_len": 512, "output_len": 64}, {"prompt": "Once upon", "output_len": 64} or
// {"token_ids": [1, 2, 3], "output_len": 64}. output_len may be left out.
struct DatasetEntry {
  int64_t input_len = 0;
  int64_t output_len = 0;
  std::string prompt;
  std::vector<uint32_t> token_ids;
};
// INVALID_ARGUMENT with line number and field. default_output_len is for lines without output_len.
absl::StatusOr<std::vector<DatasetEntry>> ParseDataset(const std::string& text, int64_t default_output_len);

class Workload {
 public:
  // model: vocabulary and special tokens; random prompts use neither BOS nor EOS. Reads the dataset file.
  // INVALID_ARGUMENT for options that make no sense together.
  static absl::StatusOr<Workload> Make(const WorkloadOptions& options, const v1::GetModelInfoResponse& model);

  // Request i. Indices from num_requests on give further requests of the same kind, for the warm-up. Dataset lines are
  // used again from the start when there are fewer than requests.
  v1::GenerateRequest Request(int64_t i) const;

  // Seconds after the start at which request i is due, ascending. As in vLLM the gaps are scaled so that the last
  // request is due at num_requests / request_rate: runs with different seeds offer the same load.
  const std::vector<double>& arrivals_s() const { return arrivals_s_; }

 private:
  Workload() = default;
  uint32_t RandomToken(uint64_t stream, uint64_t position) const;

  WorkloadOptions options_;
  std::vector<DatasetEntry> dataset_;
  std::vector<uint32_t> forbidden_;  // ascending
  uint32_t vocab_size_ = 0;
  std::vector<double> arrivals_s_;
};

std::vector<double> ArrivalTimes(int64_t num_requests, double request_rate, double burstiness, uint64_t seed);

}  // namespace nibble
