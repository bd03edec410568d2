// The compiled forms of the W4Ax kernel for sm_80 to sm_89, as data: plan.cc chooses among them, kernel.cu is compiled
// once for each.
#pragma once

#include <cstdint>
#include <string_view>

#ifdef __CUDACC__
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda::sm80 {

inline constexpr int kTileRows = 128;    // weight rows of a tile
inline constexpr int kDepthBlock = 128;  // K of a step: one weight group, one activation block
inline constexpr int kUnitBytes = 64;    // of a token: a 4-bit activation block is one unit, an 8-bit one two
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kCodeBytes = kTileRows * kDepthBlock / 2;
inline constexpr int kWeightBlockBytes = kCodeBytes + 2 * kTileRows;  // codes, then s2 and m + 128 of each row

// A thread block computes tiles of 128 weight rows × `tokens` tokens with its eight warps as `row_warps` along the rows
// by the rest along the tokens.
struct GemmConfig {
  std::string_view name;
  int tokens;
  int row_warps;
  int stages;  // steps of the pipeline: one multiplied, the others on their way

  NIBBLE_HOST_DEVICE constexpr int token_warps() const { return kWarps / row_warps; }
  NIBBLE_HOST_DEVICE constexpr int warp_rows() const { return kTileRows / row_warps; }
  NIBBLE_HOST_DEVICE constexpr int warp_tokens() const { return tokens / token_warps(); }
  NIBBLE_HOST_DEVICE constexpr int sums() const { return kTileRows * tokens / kThreads; }  // of a thread

  // A stage of shared memory, in this order: a block of weights, room for two units of each token, exponents.
  NIBBLE_HOST_DEVICE constexpr int exponents_at() const { return kWeightBlockBytes + 2 * kUnitBytes * tokens; }
  NIBBLE_HOST_DEVICE constexpr int stage_bytes() const { return exponents_at() + (tokens + 127) / 128 * 128; }
  // After the last step the same memory takes the outputs, in f32, rows of one token apart by an odd number of quads.
  NIBBLE_HOST_DEVICE static constexpr int output_stride() { return kTileRows + 4; }
  NIBBLE_HOST_DEVICE constexpr int shared_bytes() const {
    const int pipeline = stages * stage_bytes(), output = tokens * output_stride() * 4;
    return pipeline > output ? pipeline : output;
  }
};

inline constexpr int kMaxSharedBytes = 101376 - 128;  // of a block on sm_86 and sm_89, less a flag; sm_80 has more

inline constexpr GemmConfig kGemmConfigs[] = {
    {"t16", 16, 8, 8},
    {"t32", 32, 8, 7},
    {"t64", 64, 4, 5},
    {"t128", 128, 2, 4},
};
inline constexpr int kNumGemmConfigs = sizeof(kGemmConfigs) / sizeof(kGemmConfigs[0]);
inline constexpr int kMostTileTokens = 128;

constexpr bool GemmConfigsFit() {
  for (const GemmConfig& c : kGemmConfigs) {
    if (c.shared_bytes() > kMaxSharedBytes || c.tokens > kMostTileTokens) return false;
    if (c.warp_rows() % 16 != 0 || c.warp_tokens() % 8 != 0 || c.stages < 2) return false;
  }
  return true;
}
static_assert(GemmConfigsFit());

}  // namespace nibble::cuda::sm80
