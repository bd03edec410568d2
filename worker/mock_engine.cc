#include "worker/mock_engine.h"

#include <spdlog/fmt/fmt.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "common/base/status.h"
#include "kernels/ops.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a counter-based stream is Mix(key + n · golden ratio).
uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ull;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
uint64_t Draw(uint64_t key, uint64_t n) { return Mix(key + (n + 1) * 0x9e3779b97f4a7c15ull); }

struct Slot {
  bool started = false;
  uint64_t key = 0;             // of the request's token stream
  int64_t num_prompt_tokens = 0;
  int64_t known_tokens = 0;     // given or sampled
  int64_t computed_tokens = 0;  // whose KV a real engine would hold
  int64_t pages = 0;
  v1::StepSampling sampling;
};

class MockEngine : public Engine {
 public:
  MockEngine(const MockOptions& options, const EngineLimits& limits, int rank, int64_t num_pages, int64_t page_bytes)
      : options_(options),
        limits_(limits),
        rank_(rank),
        num_pages_(num_pages),
        page_bytes_(page_bytes),
        slots_(static_cast<size_t>(limits.max_sequences)) {}

  int64_t num_pages() const override { return num_pages_; }
  int64_t kv_page_bytes() const override { return page_bytes_; }
  void Reset() override { std::fill(slots_.begin(), slots_.end(), Slot()); }

  absl::Status Execute(const v1::StepPlan& plan, v1::StepResult* result) override {
    const auto start = Clock::now();
    for (const uint32_t slot : plan.release_slots()) {
      NIBBLE_ASSIGN_OR_RETURN(Slot * released, Started("release_slots", slot));
      *released = Slot();
    }
    for (const auto& sequence : plan.start()) NIBBLE_RETURN_IF_ERROR(StartOne(sequence));
    NIBBLE_RETURN_IF_ERROR(AppendPages(plan));
    int64_t rows = plan.decode_slots_size();
    for (const auto& chunk : plan.prefill()) rows += chunk.num_tokens();
    if (rows > limits_.max_step_tokens) {
      return Invalid("rows of the plan", rows, "must be at most", limits_.max_step_tokens);
    }
    for (const auto& chunk : plan.prefill()) NIBBLE_RETURN_IF_ERROR(Prefill(chunk, result));
    for (const uint32_t slot : plan.decode_slots()) NIBBLE_RETURN_IF_ERROR(Decode(slot, result));
    if (options_.step_time.count() > 0) std::this_thread::sleep_until(start + options_.step_time);
    result->set_step(plan.step());
    result->set_forward_us(
        static_cast<uint32_t>(std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count()));
    return absl::OkStatus();
  }

 private:
  static absl::Status Invalid(std::string_view field, int64_t value, std::string_view rule, int64_t limit) {
    return absl::InvalidArgumentError(fmt::format("{} is {}, {} {}", field, value, rule, limit));
  }

  absl::StatusOr<Slot*> Started(std::string_view field, uint32_t slot) {
    if (slot >= slots_.size()) return Invalid(field, slot, "must be below max_sequences", limits_.max_sequences);
    if (!slots_[slot].started)
      return absl::InvalidArgumentError(fmt::format("{} names slot {}, which is free", field, slot));
    return &slots_[slot];
  }

  absl::Status StartOne(const v1::StartSequence& start) {
    if (start.slot() >= slots_.size()) {
      return Invalid("start.slot", start.slot(), "must be below max_sequences", limits_.max_sequences);
    }
    Slot& slot = slots_[start.slot()];
    if (slot.started) return absl::InvalidArgumentError(fmt::format("start.slot {} is taken", start.slot()));
    if (start.token_ids().empty()) return Invalid("start.token_ids size", 0, "must be at least", 1);
    if (start.num_prompt_tokens() > static_cast<uint32_t>(start.token_ids_size())) {
      return Invalid("start.num_prompt_tokens", start.num_prompt_tokens(), "must be at most", start.token_ids_size());
    }
    uint64_t prompt_hash = 0;
    for (int i = 0; i < start.token_ids_size(); ++i) {
      const uint32_t id = start.token_ids(i);
      if (id >= options_.model.vocab_size()) {
        return Invalid("start.token_ids", id, "must be below the vocabulary of", options_.model.vocab_size());
      }
      if (i < static_cast<int>(start.num_prompt_tokens())) prompt_hash = Mix(prompt_hash + id + 1);
    }
    if (start.num_cached_tokens() % kPageTokens != 0 ||
        start.num_cached_tokens() >= static_cast<uint32_t>(start.token_ids_size()) ||
        start.num_cached_tokens() > start.page_ids_size() * kPageTokens) {
      return Invalid("start.num_cached_tokens", start.num_cached_tokens(),
                     "must be whole pages of page_ids and leave a token to compute; tokens:", start.token_ids_size());
    }
    for (const uint32_t page : start.page_ids()) NIBBLE_RETURN_IF_ERROR(CheckPage("start.page_ids", page));
    slot.started = true;
    slot.key = start.sampling().temperature() == 0 ? prompt_hash : start.sampling().seed();
    slot.num_prompt_tokens = start.num_prompt_tokens();
    slot.known_tokens = start.token_ids_size();
    slot.computed_tokens = start.num_cached_tokens();
    slot.pages = start.page_ids_size();
    slot.sampling = start.sampling();
    return absl::OkStatus();
  }

  absl::Status CheckPage(std::string_view field, uint32_t page) const {
    return page < num_pages_ ? absl::OkStatus() : Invalid(field, page, "must be below num_pages", num_pages_);
  }

  absl::Status AppendPages(const v1::StepPlan& plan) {
    if (plan.page_slots_size() != plan.page_ids_size()) {
      return Invalid("page_slots size", plan.page_slots_size(), "must be that of page_ids,", plan.page_ids_size());
    }
    for (int i = 0; i < plan.page_ids_size(); ++i) {
      NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Started("page_slots", plan.page_slots(i)));
      NIBBLE_RETURN_IF_ERROR(CheckPage("page_ids", plan.page_ids(i)));
      ++slot->pages;
    }
    return absl::OkStatus();
  }

  // Computes the next `tokens` known tokens of a slot.
  absl::Status Advance(std::string_view field, uint32_t index, Slot& slot, int64_t tokens) {
    if (tokens < 1 || tokens > slot.known_tokens - slot.computed_tokens) {
      return absl::InvalidArgumentError(fmt::format("{} asks for {} tokens of slot {}, it has {} known and {} computed",
                                                    field, tokens, index, slot.known_tokens, slot.computed_tokens));
    }
    if (slot.computed_tokens + tokens > slot.pages * kPageTokens) {
      return absl::InvalidArgumentError(fmt::format("{} takes slot {} to {} tokens, its {} pages hold {}", field, index,
                                                    slot.computed_tokens + tokens, slot.pages,
                                                    slot.pages * kPageTokens));
    }
    slot.computed_tokens += tokens;
    return absl::OkStatus();
  }

  absl::Status Prefill(const v1::PrefillChunk& chunk, v1::StepResult* result) {
    NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Started("prefill.slot", chunk.slot()));
    const int64_t first = slot->computed_tokens;
    NIBBLE_RETURN_IF_ERROR(Advance("prefill.num_tokens", chunk.slot(), *slot, chunk.num_tokens()));
    if (slot->sampling.prompt_logprobs() && rank_ == 0) {
      for (int64_t position = first + 1; position <= std::min(slot->computed_tokens, slot->num_prompt_tokens - 1);
           ++position) {
        FillLogprobs(chunk.slot(), *slot, position, slot->sampling.num_top_prompt_logprobs(),
                     result->add_prompt_logprobs());
      }
    }
    if (!chunk.sample()) return absl::OkStatus();
    if (slot->computed_tokens != slot->known_tokens) {
      return Invalid("prefill.sample at token", slot->computed_tokens, "must be at the last known token,",
                     slot->known_tokens);
    }
    Sample(chunk.slot(), *slot, result);
    return absl::OkStatus();
  }

  absl::Status Decode(uint32_t index, v1::StepResult* result) {
    NIBBLE_ASSIGN_OR_RETURN(Slot * slot, Started("decode_slots", index));
    if (slot->computed_tokens != slot->known_tokens - 1) {
      return absl::InvalidArgumentError(fmt::format("decode_slots names slot {}, which still has {} tokens to prefill",
                                                    index, slot->known_tokens - slot->computed_tokens));
    }
    NIBBLE_RETURN_IF_ERROR(Advance("decode_slots", index, *slot, 1));
    Sample(index, *slot, result);
    return absl::OkStatus();
  }

  uint32_t TokenAt(const Slot& slot, int64_t position) const {
    return static_cast<uint32_t>(Draw(slot.key, static_cast<uint64_t>(position)) % options_.model.vocab_size());
  }

  void Sample(uint32_t index, Slot& slot, v1::StepResult* result) {
    const int64_t position = slot.known_tokens++;
    if (rank_ != 0) return;
    result->add_token_ids(TokenAt(slot, position));
    if (slot.sampling.logprobs()) {
      FillLogprobs(index, slot, position, slot.sampling.num_top_logprobs(), result->add_logprobs());
    }
  }

  // A flat distribution: every token is as likely as every other.
  void FillLogprobs(uint32_t index, const Slot& slot, int64_t position, uint32_t top, v1::RowLogprobs* out) const {
    const float logprob = -std::log(static_cast<float>(options_.model.vocab_size()));
    const uint32_t token = TokenAt(slot, position);
    out->set_slot(index);
    out->set_token_id(token);
    out->set_logprob(logprob);
    for (uint32_t i = 0; i < std::min<uint32_t>(top, kMaxTopLogprobs); ++i) {
      out->add_top_ids((token + i) % options_.model.vocab_size());
      out->add_top_logprobs(logprob);
    }
  }

  const MockOptions options_;
  const EngineLimits limits_;
  const int rank_;
  const int64_t num_pages_;
  const int64_t page_bytes_;
  std::vector<Slot> slots_;
};

// Ranks of a mock exchange nothing, so meeting needs no peers.
class MockCommunicator : public Communicator {
 public:
  MockCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::Status AllReduceSum(const Rows& rows) override { return absl::OkStatus(); }
  absl::Status AllGather(const void* in, int64_t rows, size_t row_bytes, void* out) override {
    return absl::OkStatus();
  }
  void Abort(std::string_view reason) override {}

 private:
  const int rank_;
  const int size_;
};

class PendingMockCommunicator : public PendingCommunicator {
 public:
  PendingMockCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  std::string endpoint() const override { return fmt::format("mock:{}/{}", rank_, size_); }
  absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::span<const std::string> endpoints) override {
    for (int r = 0; r < size_; ++r) {
      if (endpoints.size() != static_cast<size_t>(size_) ||
          endpoints[static_cast<size_t>(r)] != fmt::format("mock:{}/{}", r, size_)) {
        return absl::InvalidArgumentError(fmt::format(
            "endpoints: {} given, must be those of the {} mock ranks in rank order", endpoints.size(), size_));
      }
    }
    return std::make_unique<MockCommunicator>(rank_, size_);
  }

 private:
  const int rank_;
  const int size_;
};

class MockShard : public Shard {
 public:
  MockShard(const MockOptions& options, int rank, int world_size)
      : options_(options), rank_(rank), world_size_(world_size) {}

  absl::StatusOr<std::unique_ptr<Engine>> CreateEngine(std::shared_ptr<Communicator> communicator,
                                                       const EngineLimits& limits) override {
    // As the CPU page: K and V codes of half a byte, one scale and one minimum (2 + 2 bytes) per token and head.
    const int64_t heads = std::max<int64_t>(1, options_.model.num_kv_heads() / world_size_);
    const int64_t page_bytes = options_.model.num_layers() * heads * kPageTokens * 2 * (options_.head_dim / 2 + 4);
    const int64_t pages = std::min(limits.kv_memory_bytes / std::max<int64_t>(1, page_bytes), kMaxPages);
    if (pages < 1) {
      return absl::ResourceExhaustedError(
          fmt::format("kv memory is {} bytes, one page needs {}", limits.kv_memory_bytes, page_bytes));
    }
    return std::make_unique<MockEngine>(options_, limits, rank_, pages, page_bytes);
  }

 private:
  static constexpr int64_t kMaxPages = 1 << 24;  // the router keeps a few bytes for each
  const MockOptions options_;
  const int rank_;
  const int world_size_;
};

class MockBackend : public Backend {
 public:
  explicit MockBackend(const MockOptions& options) : options_(options) {}
  std::string name() const override { return "mock"; }
  std::string device() const override { return fmt::format("mock: {} us per step", options_.step_time.count()); }
  v1::ModelInfo model() const override { return options_.model; }
  absl::StatusOr<std::shared_ptr<Shard>> Load(int rank, int world_size) override {
    return std::make_shared<MockShard>(options_, rank, world_size);
  }
  absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareCommunicator(int rank, int world_size) override {
    return std::make_unique<PendingMockCommunicator>(rank, world_size);
  }

 private:
  const MockOptions options_;
};

}  // namespace

std::unique_ptr<Backend> MakeMockBackend(const MockOptions& options) { return std::make_unique<MockBackend>(options); }

}  // namespace nibble
