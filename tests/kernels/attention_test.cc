// RoPE, KV pages and attention against double arithmetic over the pages' own contents, and the independence of rows
// from how a sequence was cut into steps.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "kernels/cuda/attention/kv_page.h"
#include "tests/kernels/backends.h"

namespace nibble::testing {
namespace {

constexpr int64_t kMaxPositions = 512;

std::vector<float> CosSin(int64_t d) {
  std::vector<float> table(kMaxPositions * d);
  for (int64_t p = 0; p < kMaxPositions; ++p) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const double angle =
          static_cast<double>(p) * std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      table[p * d + i] = static_cast<float>(std::cos(angle));
      table[p * d + d / 2 + i] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

// One layer's cache for a case, and steps over it. Pages are handed out in a scrambled order; unused ones stay
// poisoned.
class Cache {
 public:
  Cache(const Backend& backend, const AttentionCase& c)
      : ops_(*backend.ops),
        exact_(backend.exact),
        c_(c),
        max_pages_(kMaxPositions / kPageTokens),
        num_pages_(max_pages_ * static_cast<int64_t>(c.sequences.size()) + 1),
        layout_{c.format, c.kv_heads, c.head_dim},
        pages_(ops_, num_pages_ * layout_.page_bytes()),
        cos_sin_(ops_, CosSin(c.head_dim)) {
    tables_.resize(num_pages_ - 1);
    std::iota(tables_.begin(), tables_.end(), 1);
    std::shuffle(tables_.begin(), tables_.end(), std::mt19937(9));
  }

  int64_t qkv_cols() const { return (c_.q_heads + 2 * c_.kv_heads) * c_.head_dim; }

  struct Part {
    int64_t sequence, position, rows;
  };
  struct Result {
    std::vector<float> qkv;     // after rotation
    std::vector<uint8_t> out;   // bytes
    std::vector<float> values;  // the same as f32
  };
  // Appends and attends rows of several sequences; qkv holds their rows one after the other.
  Result Step(const std::vector<Part>& parts, const std::vector<float>& qkv) {
    std::vector<int32_t> positions, row_sequence, row_begin = {0}, tables;
    for (size_t s = 0; s < parts.size(); ++s) {
      for (int64_t i = 0; i < parts[s].rows; ++i) {
        positions.push_back(static_cast<int32_t>(parts[s].position + i));
        row_sequence.push_back(static_cast<int32_t>(s));
      }
      row_begin.push_back(static_cast<int32_t>(positions.size()));
      const int64_t used = (parts[s].position + parts[s].rows - 1) / kPageTokens + 1;
      for (int64_t i = 0; i < max_pages_; ++i) {  // entries past the context are garbage
        tables.push_back(i < used ? tables_[parts[s].sequence * max_pages_ + i] : -77);
      }
    }
    const int64_t rows = static_cast<int64_t>(positions.size());
    Array<int32_t> positions_array(ops_, positions), sequence_array(ops_, row_sequence), begin_array(ops_, row_begin),
        tables_array(ops_, tables);
    RowsArray qkv_array(ops_, c_.dtype, rows, qkv_cols(), qkv), out(ops_, c_.dtype, rows, c_.q_heads * c_.head_dim);
    const StepRows step = {.rows = rows,
                           .sequences = static_cast<int64_t>(parts.size()),
                           .positions = positions_array.data(),
                           .row_sequence = sequence_array.data(),
                           .row_begin = begin_array.data(),
                           .page_tables = tables_array.data(),
                           .max_pages = max_pages_};
    const KvPages pages = {pages_.data(), num_pages_, layout_};
    ops_.RopeAppend({.step = step,
                     .qkv = qkv_array.rows(),
                     .q_heads = c_.q_heads,
                     .cos_sin = cos_sin_.data(),
                     .max_positions = kMaxPositions,
                     .pages = pages});
    ops_.BeginStep({.step = step, .q_heads = c_.q_heads, .layout = layout_});
    ops_.Attention({.step = step,
                    .qkv = qkv_array.rows(),
                    .q_heads = c_.q_heads,
                    .pages = pages,
                    .scale = Scale(),
                    .out = out.rows()});
    return {qkv_array.Get(), out.Bytes(), out.Get()};
  }
  float Scale() const { return 1.0f / std::sqrt(static_cast<float>(c_.head_dim)); }

  // The pages in the specification's order, whatever the backend's is.
  std::vector<uint8_t> PageBytes() const {
    std::vector<uint8_t> bytes = pages_.Get();
    if (exact_ || layout_.format != KvFormat::kKV4) return bytes;
    const std::vector<uint8_t> ordered = std::exchange(bytes, std::vector<uint8_t>(bytes.size()));
    for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(layout_.head_bytes())) {
      cuda::KvPageToSpecification(static_cast<int>(c_.head_dim), &ordered[at], &bytes[at]);
    }
    return bytes;
  }
  // K (value = false) or V of one token and head, as attention must read it. `bytes` = PageBytes().
  std::vector<double> Read(const std::vector<uint8_t>& bytes, int64_t sequence, int64_t position, int64_t head,
                           bool value) const {
    const int64_t d = c_.head_dim, token = position % kPageTokens;
    const uint8_t* half = bytes.data() +
                          tables_[sequence * max_pages_ + position / kPageTokens] * layout_.page_bytes() +
                          head * layout_.head_bytes() + (value ? layout_.head_bytes() / 2 : 0);
    std::vector<double> x(d);
    if (c_.format == KvFormat::kF32) {
      for (int64_t i = 0; i < d; ++i) {
        float f;
        std::memcpy(&f, half + (token * d + i) * 4, 4);
        x[i] = f;
      }
      return x;
    }
    F16 scale, zero;
    std::memcpy(&scale, half + kPageTokens * d / 2 + token * 2, 2);
    std::memcpy(&zero, half + kPageTokens * d / 2 + kPageTokens * 2 + token * 2, 2);
    for (int64_t i = 0; i < d; ++i) {
      const int code = half[(token * d + i) / 2] >> (i % 2 * 4) & 15;
      x[i] = double{ToFloat(scale)} * code + ToFloat(zero);
    }
    return x;
  }

 private:
  Ops& ops_;
  bool exact_;
  AttentionCase c_;
  int64_t max_pages_, num_pages_;
  KvLayout layout_;
  Array<uint8_t> pages_;
  Array<float> cos_sin_;
  std::vector<int32_t> tables_;
};

// The qkv rows of a whole sequence, positions 0, 1, ...
std::vector<float> SequenceRows(const AttentionCase& c, int64_t sequence, int64_t cols) {
  const auto [cached, added] = c.sequences[sequence];
  return Rounded(c.dtype, Values(sequence % 2 == 0 ? Fill::kNormal : Fill::kOutliers, (cached + added) * cols,
                                 static_cast<uint32_t>(40 + sequence)));
}

class AttentionTest : public BackendTest {
 protected:
  // Fills the caches, one prefill step per sequence, then runs the case's step.
  Cache::Result RunCase(Cache& cache, const AttentionCase& c) {
    const int64_t cols = cache.qkv_cols();
    std::vector<Cache::Part> parts;
    std::vector<float> rows;
    for (int64_t s = 0; s < static_cast<int64_t>(c.sequences.size()); ++s) {
      const auto [cached, added] = c.sequences[s];
      const std::vector<float> all = SequenceRows(c, s, cols);
      if (cached > 0) cache.Step({{s, 0, cached}}, {all.begin(), all.begin() + cached * cols});
      parts.push_back({s, cached, added});
      rows.insert(rows.end(), all.begin() + cached * cols, all.end());
    }
    return cache.Step(parts, rows);
  }
};

TEST_P(AttentionTest, AgainstDouble) {
  for (const AttentionCase& c : kAttentionCases) {
    Cache cache(GetParam(), c);
    const Cache::Result got = RunCase(cache, c);
    const std::vector<uint8_t> bytes = cache.PageBytes();
    const int64_t d = c.head_dim, group = c.q_heads / c.kv_heads;
    std::vector<double> want, bound;
    int64_t row = 0;
    for (int64_t s = 0; s < static_cast<int64_t>(c.sequences.size()); ++s) {
      const auto [cached, added] = c.sequences[s];
      for (int64_t position = cached; position < cached + added; ++position, ++row) {
        for (int64_t h = 0; h < c.q_heads; ++h) {
          const float* q = &got.qkv[row * cache.qkv_cols() + h * d];
          std::vector<double> scores;
          double high = -INFINITY;
          for (int64_t j = 0; j <= position; ++j) {
            const std::vector<double> k = cache.Read(bytes, s, j, h / group, false);
            double dot = 0;
            for (int64_t i = 0; i < d; ++i) dot += q[i] * k[i];
            scores.push_back(dot * cache.Scale());
            high = std::max(high, scores.back());
          }
          double sum = 0, magnitude = 0, largest = 0;
          std::vector<double> o(d);
          for (int64_t j = 0; j <= position; ++j) {
            const double p = std::exp(scores[j] - high);
            const std::vector<double> v = cache.Read(bytes, s, j, h / group, true);
            double high_v = 0;
            sum += p;
            for (int64_t i = 0; i < d; ++i) {
              o[i] += p * v[i];
              high_v = std::max(high_v, std::abs(v[i]));
              largest = std::max(largest, p * std::abs(v[i]));
            }
            magnitude += p * high_v;
          }
          for (int64_t i = 0; i < d; ++i) {
            want.push_back(o[i] / sum);
            // Another backend multiplies V by probabilities of sixteen bits.
            const double products = exact() ? 0 : magnitude / sum * 0x1p-8;
            bound.push_back(OutputUlp(c.dtype, want.back()) + 1e-4 * largest + products);
          }
        }
      }
    }
    ExpectClose(got.values, want, bound, c.q_heads * d, "head_dim " + std::to_string(d));
  }
}

TEST_P(AttentionTest, RopeRotatesPairs) {
  for (const AttentionCase& c : kAttentionCases) {
    Cache cache(GetParam(), c);
    const Cache::Result got = RunCase(cache, c);
    const int64_t d = c.head_dim, cols = cache.qkv_cols();
    const std::vector<float> cos_sin = CosSin(d);
    int64_t row = 0;
    for (int64_t s = 0; s < static_cast<int64_t>(c.sequences.size()); ++s) {
      const auto [cached, added] = c.sequences[s];
      const std::vector<float> all = SequenceRows(c, s, cols);
      for (int64_t p = cached; p < cached + added; ++p, ++row) {
        for (int64_t h = 0; h < c.q_heads; ++h) {
          const float* x = &all[p * cols + h * d];
          for (int64_t i = 0; i < d / 2; ++i) {
            const double cosine = cos_sin[p * d + i], sine = cos_sin[p * d + d / 2 + i];
            const double lo = x[i] * cosine - x[i + d / 2] * sine, hi = x[i + d / 2] * cosine + x[i] * sine;
            const double size = std::abs(x[i]) + std::abs(x[i + d / 2]);
            ASSERT_NEAR(got.qkv[row * cols + h * d + i], lo, OutputUlp(c.dtype, lo) + 2e-7 * size);
            ASSERT_NEAR(got.qkv[row * cols + h * d + d / 2 + i], hi, OutputUlp(c.dtype, hi) + 2e-7 * size);
          }
        }
        for (int64_t i = c.q_heads * d; i < cols; ++i) {  // k and v stay as they were
          ASSERT_EQ(got.qkv[row * cols + i], all[p * cols + i]);
        }
      }
    }
  }
}

// Of V, which is not rotated: scale, zero and codes follow docs/numerics.md exactly.
TEST_P(AttentionTest, Kv4FollowsTheFormat) {
  for (Fill fill : kAllFills) {
    const AttentionCase c = {1, 1, 64, KvFormat::kKV4, DType::kF32, {{0, 3}}};
    Cache cache(GetParam(), c);
    const std::vector<float> rows = Values(fill, 3 * cache.qkv_cols(), 41);
    cache.Step({{0, 0, 3}}, rows);
    const std::vector<uint8_t> bytes = cache.PageBytes();
    for (int64_t t = 0; t < 3; ++t) {
      const std::vector<double> got = cache.Read(bytes, 0, t, 0, true);
      const float* v = &rows[t * cache.qkv_cols() + 2 * 64];
      const auto [low, high] = std::minmax_element(v, v + 64);
      const auto saturated = [](float x) { return ToFloat(ToF16(std::clamp(x, -65504.0f, 65504.0f))); };
      const float scale = saturated((*high - *low) / 15.0f), zero = saturated(*low);
      for (int64_t i = 0; i < 64; ++i) {
        const float code = scale == 0 ? 0 : std::clamp(std::nearbyint((v[i] - zero) / scale), 0.0f, 15.0f);
        ASSERT_EQ(got[i], double{scale} * code + zero) << "token " << t << " channel " << i;
        ASSERT_TRUE(std::isfinite(got[i]));
      }
    }
  }
}

// The same rows in one chunk, in chunks of 1, 16, 63, 64, 100, and beside other sequences: the same bits.
TEST_P(AttentionTest, ChunkingDoesNotChangeARow) {
  for (const AttentionCase& shape : kAttentionCases) {
    AttentionCase c = shape;
    constexpr int64_t kLength = 150;
    c.sequences = {{0, kLength}, {0, 40}};
    Cache reference(GetParam(), c);
    const int64_t cols = reference.qkv_cols(), out_bytes = c.q_heads * c.head_dim * SizeOf(c.dtype);
    const std::vector<float> rows = SequenceRows(c, 0, cols), other = SequenceRows(c, 1, cols);
    const std::vector<uint8_t> want = reference.Step({{0, 0, kLength}}, rows).out;
    const std::vector<uint8_t> want_pages = reference.PageBytes();
    for (int64_t chunk : {1, 16, 63, 64, 100}) {
      Cache cache(GetParam(), c);
      std::vector<uint8_t> got;
      for (int64_t begin = 0; begin < kLength; begin += chunk) {
        const int64_t count = std::min(chunk, kLength - begin);
        const std::vector<uint8_t> out =
            cache.Step({{0, begin, count}}, {rows.begin() + begin * cols, rows.begin() + (begin + count) * cols}).out;
        got.insert(got.end(), out.begin(), out.end());
      }
      ASSERT_EQ(got, want) << "chunks of " << chunk << ", head_dim " << c.head_dim;
      ASSERT_EQ(cache.PageBytes(), want_pages) << "chunks of " << chunk << ", head_dim " << c.head_dim;
    }
    // Among others in one step, in either place.
    Cache cache(GetParam(), c);
    cache.Step({{0, 0, 100}}, {rows.begin(), rows.begin() + 100 * cols});
    std::vector<float> both = other;
    both.insert(both.end(), rows.begin() + 100 * cols, rows.begin() + 130 * cols);
    std::vector<uint8_t> out = cache.Step({{1, 0, 40}, {0, 100, 30}}, both).out;
    ASSERT_EQ(std::vector<uint8_t>(out.begin() + 40 * out_bytes, out.end()),
              std::vector<uint8_t>(want.begin() + 100 * out_bytes, want.begin() + 130 * out_bytes));
  }
}

TEST_P(AttentionTest, EqualsTheSpecification) {
  for (const AttentionCase& c : kAttentionCases) {
    Cache specification(AllBackends()[0], c), cache(GetParam(), c);
    const Cache::Result want = RunCase(specification, c), got = RunCase(cache, c);
    EXPECT_EQ(got.qkv, want.qkv) << "head_dim " << c.head_dim;
    if (exact()) EXPECT_EQ(got.out, want.out) << "head_dim " << c.head_dim;
    EXPECT_EQ(cache.PageBytes(), specification.PageBytes()) << "head_dim " << c.head_dim;
  }
}

INSTANTIATE_TEST_SUITE_P(All, AttentionTest, ::testing::ValuesIn(AllBackends()),
                         [](const auto& backend) { return backend.param.name; });

}  // namespace
}  // namespace nibble::testing
