#include "tools/bench/op_case.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "absl/strings/str_cat.h"

namespace nibble {
namespace {

// Random up to this many, then repeated: benchmarks of gigabytes start in a second.
constexpr int64_t kPattern = (int64_t{4} << 20) - 3;  // odd, so that rows do not repeat

template <typename T, typename Make>
std::vector<T> Repeated(int64_t count, Make make) {
  std::vector<T> values(count);
  const int64_t fresh = std::min(count, kPattern);
  for (int64_t i = 0; i < fresh; ++i) values[i] = make();
  for (int64_t i = fresh; i < count; i += fresh) std::copy_n(values.begin(), std::min(fresh, count - i), values.begin() + i);
  return values;
}

// Orders bf16 bit patterns as their values.
int Ordered(BF16 x) { return (x.bits & 0x8000) != 0 ? -(x.bits & 0x7fff) : x.bits; }

}  // namespace

absl::StatusOr<std::unique_ptr<OpCase>> MakeOpCase(const OpContext& context, const OpSpec& spec) {
  if (spec.op == "linear" || spec.op == "lm_head") return MakeLinearCase(context, spec);
  if (spec.op == "attention" || spec.op == "prefill" || spec.op == "rope_append") return MakeAttentionCase(context, spec);
  if (spec.op == "sample" || spec.op == "record_history") return MakeSamplingCase(context, spec);
  return MakeRowsCase(context, spec);
}

std::vector<uint8_t> RandomBytes(int64_t count, uint64_t seed) {
  std::mt19937 random(static_cast<uint32_t>(seed));
  return Repeated<uint8_t>(count, [&] { return static_cast<uint8_t>(random() >> 8); });
}
std::vector<BF16> RandomBF16(int64_t count, uint64_t seed, float scale) {
  std::mt19937 random(static_cast<uint32_t>(seed));
  std::normal_distribution<float> normal(0, scale);
  return Repeated<BF16>(count, [&] { return ToBF16(normal(random)); });
}
std::vector<float> RandomFloats(int64_t count, uint64_t seed, float scale) {
  std::mt19937 random(static_cast<uint32_t>(seed));
  std::normal_distribution<float> normal(0, scale);
  return Repeated<float>(count, [&] { return normal(random); });
}

std::vector<uint8_t> BlockBits(int64_t k, bool all_wide) {
  std::vector<uint8_t> bits(k / kBlock);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = all_wide || i % 8 == 0 ? 8 : 4;
  return bits;
}

std::string FirstFarBF16(const char* name, std::span<const BF16> got, std::span<const BF16> want, int ulps,
                         float near_zero) {
  for (size_t i = 0; i < want.size(); ++i) {
    const float g = ToFloat(got[i]), w = ToFloat(want[i]);
    if (std::abs(Ordered(got[i]) - Ordered(want[i])) <= ulps || std::abs(g - w) <= near_zero) continue;
    return absl::StrCat(name, " is ", g, " at ", i, ", not ", w);
  }
  return "";
}

}  // namespace nibble
