// A backend without arithmetic: it answers every plan at once, or after a fixed time, with pseudo-random tokens. It
// exists to measure and to test the control plane at full speed and at any model shape; no weights are read.
//
// The token at a position depends on that position and the request alone (its seed, or its prompt when greedy), so
// replay, preemption and chunking give the same tokens, as with the real engine.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "worker/backend.h"

namespace nibble {

struct MockOptions {
  v1::ModelInfo model;
  int64_t head_dim = 128;
  std::chrono::microseconds step_time{0};  // simulated duration of one step
};

std::unique_ptr<Backend> MakeMockBackend(const MockOptions& options);

}  // namespace nibble
