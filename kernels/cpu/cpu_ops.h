// The CPU backend: the specification every other backend is compared with, and what serves when there is no GPU.
#pragma once

#include <memory>
#include <optional>

#include "kernels/cpu/kernel_table.h"
#include "kernels/ops.h"

namespace nibble {

struct CpuOptions {
  int threads = 1;         // the caller's included
  std::optional<Isa> isa;  // forces a level (tests, measurements); the fastest available one otherwise
};

// `isa` must be available.
std::unique_ptr<Ops> CreateCpuOps(const CpuOptions& options);

}  // namespace nibble
