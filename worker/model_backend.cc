#include "worker/model_backend.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <mutex>
#include <thread>
#include <utility>

#include "common/base/log.h"
#include "common/base/status.h"
#include "kernels/ops.h"

namespace nibble {
namespace {

class ModelShard : public Shard {
 public:
  explicit ModelShard(std::shared_ptr<const Model> model) : model_(std::move(model)) {}

  absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<Communicator> communicator,
                                                       const EngineLimits& limits) override {
    return nibble::CreateEngine(model_, std::move(communicator), limits);
  }

 private:
  const std::shared_ptr<const Model> model_;
};

class ModelBackend : public Backend {
 public:
  ModelBackend(std::unique_ptr<Checkpoint> checkpoint, const ModelBackendOptions& options, std::string device)
      : checkpoint_(std::move(checkpoint)),
        options_(options),
        device_(std::move(device)),
        model_(DescribeModel(checkpoint_->config(), checkpoint_->Fingerprint())) {}

  std::string name() const override { return options_.backend; }
  std::string device() const override { return device_; }
  v1::ModelInfo model() const override { return model_; }

  absl::StatusOr<std::shared_ptr<Shard>> Load(int rank, int world_size) override {
    if (options_.backend == "cuda" && world_size > 1) {
      return absl::UnimplementedError(
          fmt::format("a group of {} ranks on backend cuda: collectives work on host memory only", world_size));
    }
    std::lock_guard lock(mutex_);  // one load at a time: two would fight for memory and disk
    if (shard_ != nullptr && rank_ == rank && world_size_ == world_size) return shard_;
    shard_ = nullptr;  // the old shard goes before the new one comes, unless a group still uses it
    const int machine_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const int threads = options_.threads > 0 ? options_.threads : std::max(1, machine_threads / world_size);
    NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Ops> ops,
                            CreateOps({.backend = options_.backend, .threads = threads, .device = options_.device}));
    LogInfo("loading model={} rank={} world_size={} device=\"{}\"", model_.name(), rank, world_size, ops->Describe());
    NIBBLE_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model,
                            LoadModel(*checkpoint_, std::shared_ptr<Ops>(std::move(ops)), rank, world_size));
    shard_ = std::make_shared<ModelShard>(std::move(model));
    rank_ = rank;
    world_size_ = world_size;
    return shard_;
  }

  absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(int rank, int world_size) override {
    return nibble::PrepareCommunicator(
        {.rank = rank, .size = world_size, .host = options_.advertise_host, .timeout = options_.collective_timeout});
  }

 private:
  const std::unique_ptr<Checkpoint> checkpoint_;
  const ModelBackendOptions options_;
  const std::string device_;
  const v1::ModelInfo model_;

  std::mutex mutex_;  // guards the shard loaded last
  std::shared_ptr<Shard> shard_;
  int rank_ = 0;
  int world_size_ = 0;
};

// The first backend of `names` this build and machine have.
absl::StatusOr<std::pair<std::string, std::string>> FindDevice(std::initializer_list<const char*> names,
                                                               const ModelBackendOptions& options) {
  absl::Status last;
  for (const char* name : names) {
    const int threads =
        options.threads > 0 ? options.threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    auto ops = CreateOps({.backend = name, .threads = threads, .device = options.device});
    if (ops.ok()) return std::pair(std::string(name), (*ops)->Describe());
    last = ops.status();
  }
  return last;
}

}  // namespace

v1::ModelInfo DescribeModel(const ModelConfig& config, const std::string& fingerprint) {
  v1::ModelInfo info;
  info.set_name(config.name);
  info.set_fingerprint(fingerprint);
  info.set_quantization(QuantizationName(config.quantization));
  info.set_vocab_size(static_cast<uint32_t>(config.vocab_size));
  info.set_max_context_length(static_cast<uint32_t>(config.max_position_embeddings));
  info.set_num_layers(static_cast<uint32_t>(config.num_layers));
  info.set_hidden_size(static_cast<uint32_t>(config.hidden_size));
  info.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  return info;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeModelBackend(const std::string& model_dir,
                                                          const ModelBackendOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(model_dir));
  const auto found =
      options.backend == "auto" ? FindDevice({"cuda", "cpu"}, options) : FindDevice({options.backend.c_str()}, options);
  if (!found.ok()) return Annotate(found.status(), fmt::format("backend {}", options.backend));
  ModelBackendOptions resolved = options;
  resolved.backend = found->first;
  return std::make_unique<ModelBackend>(std::move(checkpoint), resolved, found->second);
}

}  // namespace nibble
