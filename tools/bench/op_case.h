// One operator on one shape, with its data on the backend: what `nibble-bench op` times and checks.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/base/check.h"
#include "kernels/ops.h"
#include "tools/bench/op_table.h"

namespace nibble {

// What the operations of a case are counted against.
enum class OpUnit : uint8_t { kNone, kInt8, kBF16 };

class OpCase {
 public:
  virtual ~OpCase() = default;

  // Queues the operator once. Launches of consecutive numbers read different memory, `copies` in turn.
  virtual void Issue(int launch) = 0;

  // Queues it once over poisoned outputs and compares with the CPU specification (of all, or of rows and outputs drawn
  // at random): empty, or what is wrong and where.
  virtual std::string Check() = 0;

  double bytes = 0;       // that one launch must move at least
  double operations = 0;  // that it must do, two per multiply-add
  OpUnit unit = OpUnit::kNone;
  int64_t n = 0, k = 0;   // of a linear
};

struct OpContext {
  Ops& ops;                  // measured
  Ops& specification;        // the CPU backend
  int64_t rotate_bytes = 0;  // inputs are copied until they exceed this
};

// RESOURCE_EXHAUSTED when the shape does not fit the device.
absl::StatusOr<std::unique_ptr<OpCase>> MakeOpCase(const OpContext& context, const OpSpec& spec);

// One per file op_<family>.cc.
absl::StatusOr<std::unique_ptr<OpCase>> MakeLinearCase(const OpContext& context, const OpSpec& spec);
absl::StatusOr<std::unique_ptr<OpCase>> MakeAttentionCase(const OpContext& context, const OpSpec& spec);
absl::StatusOr<std::unique_ptr<OpCase>> MakeRowsCase(const OpContext& context, const OpSpec& spec);
absl::StatusOr<std::unique_ptr<OpCase>> MakeSamplingCase(const OpContext& context, const OpSpec& spec);

// ---- data ----------------------------------------------------------------------------------------------------------

// Reproducible random contents. Long ones repeat a shorter pattern.
std::vector<uint8_t> RandomBytes(int64_t count, uint64_t seed);
std::vector<BF16> RandomBF16(int64_t count, uint64_t seed, float scale = 1);
std::vector<float> RandomFloats(int64_t count, uint64_t seed, float scale = 1);
// InputCoding::block_bits of K channels: one block in eight has 8 bits, or all have.
std::vector<uint8_t> BlockBits(int64_t k, bool all_wide);

// An array of a backend. Memory that does not exist is a failed check: sizes were made to fit by MakeOpCase.
template <typename T>
class OpArray {
 public:
  OpArray(Ops& ops, int64_t count) : ops_(&ops), count_(count) {
    auto buffer = ops.Allocate(static_cast<size_t>(count) * sizeof(T));
    NIBBLE_CHECK(buffer.ok(), buffer.status().ToString());
    buffer_ = *std::move(buffer);
  }
  OpArray(Ops& ops, std::span<const T> contents) : OpArray(ops, static_cast<int64_t>(contents.size())) {
    ops.Upload(buffer_.data(), contents.data(), contents.size_bytes());
  }
  OpArray(Ops& ops, const std::vector<T>& contents) : OpArray(ops, std::span<const T>(contents)) {}

  T* data() const { return buffer_.template as<T>(); }
  int64_t count() const { return count_; }
  std::vector<T> Get() const {
    std::vector<T> contents(count_);
    ops_->Download(contents.data(), data(), contents.size() * sizeof(T));
    return contents;
  }
  // All ones: NaN as a float, an impossible id, no legal code.
  void Poison() {
    const std::vector<uint8_t> ones(count_ * sizeof(T), 0xff);
    ops_->Upload(data(), ones.data(), ones.size());
  }

 private:
  Ops* ops_;
  int64_t count_;
  Buffer buffer_;
};

// Where two results differ, or empty.
template <typename T>
std::string FirstDifference(const char* name, std::span<const T> got, std::span<const T> want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) return std::string(name) + " differs at " + std::to_string(i);
  }
  return "";
}
// bf16 results within `ulps` of the last bit, or both this close to zero.
std::string FirstFarBF16(const char* name, std::span<const BF16> got, std::span<const BF16> want, int ulps,
                         float near_zero = 0);

}  // namespace nibble
