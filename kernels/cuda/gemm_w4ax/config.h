// The compiled forms of the W4Ax kernel, as data: plan.cc chooses among them, kernel.cuh is compiled once for each.
#pragma once

#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda {

inline constexpr int kRowBlock = 64;          // weight rows of a block: what one warpgroup multiplies at a time
inline constexpr int kDepthBlock = 128;       // K of a block: one weight group
inline constexpr int kW4AxBlockBytes = 4224;  // one block of weights in device order, see layout.h
// Of a weight in device order: N is padded to whole row blocks, K to an even number of depth blocks.
constexpr int64_t W4AxRowBlocks(int64_t n) { return (n + kRowBlock - 1) / kRowBlock; }
constexpr int64_t W4AxDepthBlocks(int64_t k) { return (k + 2 * kDepthBlock - 1) / (2 * kDepthBlock) * 2; }
constexpr int64_t W4AxBytes(int64_t n, int64_t k) { return W4AxRowBlocks(n) * W4AxDepthBlocks(k) * kW4AxBlockBytes; }
// A step of several depth blocks may read past K: into the next row block, whose product with activations past K, zeros,
// is zero, or past the last one into this slack.
inline constexpr int64_t kW4AxSlackBytes = 2 * kW4AxBlockBytes;

inline constexpr int kConsumers = 2;          // warpgroups that multiply; a third one copies

// A worker, a thread block or a cluster of two, computes tiles of `rows()` weight rows × `tokens` tokens. The warpgroups
// of a block that multiply either take different rows (each `blocks` row blocks), or, with shares_depth, the same 64
// rows and different depth blocks (each `blocks` of a step), and add their sums at the end. The two blocks of a cluster
// take one half of K each and add their sums, or, with multicasts, take different rows and fetch one half of the
// activations each, for both.
struct GemmConfig {
  std::string_view name;
  int tokens;             // a number that wgmma has, see ptx/wgmma.h
  int blocks;             // weight blocks of a warpgroup in a step
  bool shares_depth;
  int cluster;            // thread blocks of a worker
  bool multicasts;
  int residents;          // thread blocks per multiprocessor that shared memory and registers are cut for
  int weight_stages;      // steps of weights in flight,
  int activation_stages;  // and of activations, at most as many
  // For plan.cc: microseconds of a step when every multiprocessor works, with all row blocks and with one, and of what
  // is done once per tile. Fitted to a tuning run (docs/kernels-gemm.md).
  double step_us, one_block_step_us, tile_us;

  // Warpgroups of the worker that take different rows.
  NIBBLE_HOST_DEVICE constexpr int row_parts() const { return shares_depth ? 1 : kConsumers * (multicasts ? cluster : 1); }
  NIBBLE_HOST_DEVICE constexpr int row_blocks() const { return shares_depth ? 1 : row_parts() * blocks; }
  NIBBLE_HOST_DEVICE constexpr int rows() const { return kRowBlock * row_blocks(); }
  NIBBLE_HOST_DEVICE constexpr bool halves_depth() const { return cluster > 1 && !multicasts; }
  // A step of the pipeline of one block.
  NIBBLE_HOST_DEVICE constexpr int depth_blocks() const { return shares_depth ? kConsumers * blocks : 1; }
  NIBBLE_HOST_DEVICE constexpr int step_blocks() const { return kConsumers * blocks; }  // weight blocks, whichever way they lie
  NIBBLE_HOST_DEVICE constexpr int weight_bytes() const { return step_blocks() * kW4AxBlockBytes; }
  NIBBLE_HOST_DEVICE constexpr int activation_bytes() const { return depth_blocks() * tokens * kDepthBlock; }

  // Whether workers may share a tile. Where blocks share a multiprocessor they are more than the tiles need.
  NIBBLE_HOST_DEVICE constexpr bool streams() const { return residents == 1; }

  // Row blocks whose sums a warpgroup keeps; sums of a thread, and how many of them pass to a peer at a time.
  NIBBLE_HOST_DEVICE constexpr int accumulators() const { return shares_depth ? 1 : blocks; }
  NIBBLE_HOST_DEVICE constexpr int sums() const { return accumulators() * tokens / 2; }
  NIBBLE_HOST_DEVICE constexpr bool exchanges() const { return shares_depth || halves_depth(); }
  NIBBLE_HOST_DEVICE constexpr int exchange_sums() const {
    const int most = residents > 1 ? 32 : 64;
    return sums() < most ? sums() : most;
  }
  NIBBLE_HOST_DEVICE constexpr int exchange_bytes() const { return exchanges() ? exchange_sums() * 128 * 4 : 0; }

  // Sums of a tile that workers share travel in chunks that fit a slot of activations. Of a block: warpgroups that have
  // sums, of a thread's sums those of a chunk, chunks; of a worker: bytes.
  NIBBLE_HOST_DEVICE constexpr int sum_warpgroups() const { return exchanges() ? 1 : kConsumers; }
  NIBBLE_HOST_DEVICE constexpr int chunk_sums() const {
    const int fit = activation_bytes() / (sum_warpgroups() * 512) / 4 * 4;
    return sums() < fit ? sums() : fit;
  }
  NIBBLE_HOST_DEVICE constexpr int chunks() const { return (sums() + chunk_sums() - 1) / chunk_sums(); }
  NIBBLE_HOST_DEVICE constexpr int chunk_bytes() const { return sum_warpgroups() * chunk_sums() * 512; }
  NIBBLE_HOST_DEVICE constexpr int partial_bytes() const { return cluster * chunks() * chunk_bytes(); }

  // Tokens whose outputs a warpgroup brings together before it stores them, 64 channels of two bytes each.
  NIBBLE_HOST_DEVICE constexpr int staged_tokens() const { return tokens < 64 ? tokens : tokens % 64 == 0 ? 64 : 48; }
  NIBBLE_HOST_DEVICE constexpr int staging_bytes() const { return staged_tokens() * kRowBlock * 2; }
  // Warpgroups that store outputs: numbers 0 .. storers() - 1.
  NIBBLE_HOST_DEVICE constexpr int storers() const { return shares_depth ? 1 : kConsumers; }

  // Shared memory, in this order.
  NIBBLE_HOST_DEVICE constexpr int exchange_at() const { return activation_stages * activation_bytes(); }
  NIBBLE_HOST_DEVICE constexpr int weights_at() const { return exchange_at() + exchange_bytes(); }
  NIBBLE_HOST_DEVICE constexpr int staging_at() const { return weights_at() + weight_stages * weight_bytes(); }
  NIBBLE_HOST_DEVICE constexpr int vectors_at() const { return staging_at() + storers() * staging_bytes(); }
  NIBBLE_HOST_DEVICE constexpr int vector_floats() const { return 2 * tokens + 2 * accumulators() * kRowBlock; }  // of one warpgroup
  NIBBLE_HOST_DEVICE constexpr int barriers_at() const { return vectors_at() + storers() * vector_floats() * 4; }
  NIBBLE_HOST_DEVICE constexpr int barriers() const { return 2 * weight_stages + activation_stages + 3; }
  NIBBLE_HOST_DEVICE constexpr int shared_bytes() const { return barriers_at() + barriers() * 8; }
};

// Tokens of a box of activations for a tile of `tile_tokens`; of two halves the second begins where the swizzle repeats.
NIBBLE_HOST_DEVICE constexpr int BoxTokens(bool multicasts, int tile_tokens) {
  return multicasts ? (tile_tokens + 15) / 16 * 8 : tile_tokens;
}

inline constexpr int kMaxSharedBytes = 232448;      // of a block on sm_90
inline constexpr int kHalfSharedBytes = 115712;     // what lets two blocks share a multiprocessor

inline constexpr GemmConfig kGemmConfigs[] = {
    // name, tokens, blocks, shares_depth, cluster, multicasts, residents, weight and activation stages; costs
    {"d16", 16, 2, true, 1, false, 2, 4, 4, 0.810, 0.810, 1.1},
    {"e16", 16, 2, true, 1, false, 1, 8, 7, 0.460, 0.460, 0.6},
    {"e32", 32, 2, true, 1, false, 1, 6, 6, 0.512, 0.512, 0.45},
    {"e64", 64, 1, true, 1, false, 1, 9, 7, 0.329, 0.329, 0.75},
    {"c64", 64, 1, false, 2, false, 1, 12, 10, 0.298, 0.220, 1.75},
    {"w64", 64, 2, false, 1, false, 1, 8, 6, 0.509, 0.197, 2.6},
    {"r128", 128, 1, false, 1, false, 1, 9, 7, 0.397, 0.267, 1.35},
    {"c128", 128, 1, false, 2, false, 1, 9, 6, 0.407, 0.250, 1.85},
    {"d128", 128, 1, true, 1, false, 1, 6, 4, 0.417, 0.417, 1.25},
    {"w128", 128, 2, false, 1, false, 1, 7, 5, 0.691, 0.220, 2.95},
    {"r176", 176, 1, false, 1, false, 1, 7, 5, 0.463, 0.278, 1.6},
    {"r256", 256, 1, false, 1, false, 1, 5, 4, 0.660, 0.354, 1.7},
    {"c256", 256, 1, false, 2, false, 1, 5, 4, 0.651, 0.340, 3.7},
    {"m256", 256, 1, false, 2, true, 1, 5, 4, 0.636, 0.471, 2.45},
};
inline constexpr int kNumGemmConfigs = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);

constexpr int GemmConfigIndex(std::string_view name) {
  for (int i = 0; i < kNumGemmConfigs; ++i) {
    if (kGemmConfigs[i].name == name) return i;
  }
  return -1;
}

constexpr bool GemmConfigsFit() {
  for (const GemmConfig& c : kGemmConfigs) {
    if (c.shared_bytes() > (c.residents > 1 ? kHalfSharedBytes : kMaxSharedBytes)) return false;
    if (c.activation_stages > c.weight_stages || (c.shares_depth && c.cluster != 1)) return false;
  }
  return true;
}
static_assert(GemmConfigsFit());

}  // namespace nibble::cuda
