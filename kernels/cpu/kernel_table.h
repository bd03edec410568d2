// What is compiled once per instruction set, and how one of them is chosen. Dispatch is an explicit table of functions,
// filled from CPUID when a backend is made: no ifunc, no target_clones, nothing before main.
//
// All instruction sets give the same bits (docs/kernels.md, "One arithmetic"), so the choice is one of speed alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cpu/packing.h"
#include "kernels/ops.h"

namespace nibble {

enum class Isa : uint8_t { kPortable, kAvx2, kAvx512Vnni };

// Memory of one thread, reused from call to call.
class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, contents undefined; valid until the next Reserve. Aborts when out of
  // memory.
  void* Reserve(size_t bytes);

 private:
  Buffer buffer_;
};

// A quantized linear after the sums of its input were taken.
struct W4Problem {
  const W4Weight* weight = nullptr;
  int64_t rows = 0;
  const int8_t* codes = nullptr;        // [T, K]
  const float* scales = nullptr;        // [T]
  const int32_t* group_sums = nullptr;  // [T, K/128] Σ codes of each block
  const float* bias = nullptr;          // [N] or null
  Rows out;                             // [T, N]
};

// A dense linear whose rows are f32.
struct DenseProblem {
  const DenseWeight* weight = nullptr;
  int64_t rows = 0;
  const float* in = nullptr;  // [T, K]
  const float* bias = nullptr;
  Rows out;
};

// Every function handles the given range of independent items.
struct KernelTable {
  Isa isa = Isa::kPortable;
  const char* name = "";

  void (*add_norm)(const AddNormQuantizeArgs& args, int64_t row, Scratch* scratch);  // one output row, after add_delta
  void (*add_delta)(const AddNormQuantizeArgs& args, int64_t row);                   // one residual row
  void (*quantize)(const QuantizeArgs& args, int64_t row, Scratch* scratch);
  void (*silu_mul)(const SiluMulQuantizeArgs& args, int64_t row, Scratch* scratch);
  void (*widen)(const BF16* from, int64_t count, float* to);
  void (*group_sums)(const int8_t* codes, int64_t groups, int32_t* sums);  // of one row
  void (*w4_linear)(const W4Problem& problem, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end);
  void (*dense_linear)(const DenseProblem& problem, int64_t row_begin, int64_t row_end, int64_t tile_begin,
                       int64_t tile_end);
  void (*rope_append)(const RopeAppendArgs& args, int64_t row, Scratch* scratch);
  // Rows [row_begin, row_end) of one sequence, one KV head.
  void (*attention)(const AttentionArgs& args, int64_t row_begin, int64_t row_end, int64_t kv_head, Scratch* scratch);
  void (*sample)(const SampleArgs& args, int64_t row, Scratch* scratch);

  // For tests of the elementary functions: out[i] = f(in[i]), count a multiple of 16.
  void (*exp)(const float* in, int64_t count, float* out);
  void (*log)(const float* in, int64_t count, float* out);
  void (*neg_log_one_minus)(const float* in, int64_t count, float* out);
  void (*sigmoid)(const float* in, int64_t count, float* out);
};

// Those that this build and this machine have, slowest first; never empty.
std::vector<Isa> AvailableIsas();
// An available one's table.
const KernelTable& KernelsFor(Isa isa);

}  // namespace nibble
