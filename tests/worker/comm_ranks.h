// Groups of ranks for tests: threads of this process, each with its communicator.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "worker/comm/communicator.h"

namespace nibble::testing {

inline std::vector<std::unique_ptr<PendingCommunicator>> PrepareAll(int size, std::chrono::milliseconds timeout) {
  std::vector<std::unique_ptr<PendingCommunicator>> pending;
  for (int r = 0; r < size; ++r) {
    auto prepared = PrepareCommunicator({.rank = r, .size = size, .timeout = timeout});
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    pending.push_back(prepared.ok() ? *std::move(prepared) : nullptr);
  }
  return pending;
}

// Every rank in a thread of its own.
inline void OnRanks(int size, const std::function<void(int rank)>& f) {
  std::vector<std::jthread> threads;
  for (int r = 0; r < size; ++r) threads.emplace_back([&f, r] { f(r); });
}

inline std::vector<std::unique_ptr<Communicator>> ConnectAll(
    int size, std::chrono::milliseconds timeout = std::chrono::seconds(30)) {
  auto pending = PrepareAll(size, timeout);
  std::vector<std::string> endpoints;
  for (const auto& p : pending) endpoints.push_back(p->endpoint());
  std::vector<std::unique_ptr<Communicator>> communicators(static_cast<size_t>(size));
  OnRanks(size, [&](int r) {
    auto connected = pending[static_cast<size_t>(r)]->Connect(endpoints);
    EXPECT_TRUE(connected.ok()) << connected.status();
    if (connected.ok()) communicators[static_cast<size_t>(r)] = *std::move(connected);
  });
  return communicators;
}

}  // namespace nibble::testing
