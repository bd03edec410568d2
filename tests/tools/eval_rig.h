// Engines for tests of scoring: a model directory opened with a tap on its logits.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "common/model/checkpoint.h"
#include "tools/eval/divergence.h"
#include "tools/eval/engine_group.h"
#include "tools/eval/scorer.h"

namespace nibble::testing {

struct TappedEngine {
  TappedEngine(const std::string& dir, int64_t max_tokens, int64_t step_tokens = kScoreStepTokens, int world_size = 1) {
    auto opened = Checkpoint::Open(dir);
    NIBBLE_CHECK(opened.ok(), opened.status().ToString());
    checkpoint = *std::move(opened);
    auto created = EngineGroup::Create(
        *checkpoint, {.world_size = world_size,
                      .limits = ScoringLimits(checkpoint->config(), world_size, max_tokens, step_tokens),
                      .wrap_ops = [this](int rank, std::unique_ptr<Ops> ops) { return tap.Wrap(rank, std::move(ops)); }});
    NIBBLE_CHECK(created.ok(), created.status().ToString());
    group = *std::move(created);
  }
  TappedGroup tapped() { return {*group, tap}; }

  std::unique_ptr<Checkpoint> checkpoint;
  LogitsTap tap;
  std::unique_ptr<EngineGroup> group;  // last: its Ops know the tap
};

// Every row of logits of `sequences`, one row after the other.
inline std::vector<float> AllLogits(TappedEngine& engine, const std::vector<std::vector<uint32_t>>& sequences) {
  std::vector<float> all;
  engine.tap.SetListener([&](std::span<const float> rows, int64_t) { all.insert(all.end(), rows.begin(), rows.end()); });
  const auto scores = Score(*engine.group, sequences, 0);
  NIBBLE_CHECK(scores.ok(), scores.status().ToString());
  engine.tap.SetListener({});
  return all;
}

// Token ids below `vocab`, the same in every run.
inline std::vector<std::vector<uint32_t>> SomeSequences(size_t count, size_t length, uint32_t vocab) {
  std::vector<std::vector<uint32_t>> out(count);
  uint32_t state = 12345;
  for (auto& sequence : out) {
    for (size_t i = 0; i < length; ++i) sequence.push_back((state = state * 1664525 + 1013904223) / 65536 % vocab);
  }
  return out;
}

}  // namespace nibble::testing
