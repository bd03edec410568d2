// The table of shapes and inputs that every backend's operators are tested with: tile edges, ragged sizes, extremes.
#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace nibble::testing {

// What a tensor is filled with.
enum class Fill : uint8_t {
  kNormal,    // N(0, 1)
  kOutliers,  // N(0, 1), one channel in 50 a hundred times larger
  kZeros,
  kTiny,      // subnormal magnitudes
  kHuge,      // around 1e30
  kConstant,  // one value everywhere
};
inline constexpr Fill kAllFills[] = {Fill::kNormal, Fill::kOutliers, Fill::kZeros,
                                     Fill::kTiny,   Fill::kHuge,     Fill::kConstant};

struct W4Case {
  int64_t rows, n, k;
  DType out;
  bool bias;
};
inline const std::vector<W4Case> kW4Cases = {
    {1, 16, 128, DType::kF32, false},   {1, 1, 128, DType::kBF16, true},     {2, 17, 256, DType::kF32, true},
    {3, 31, 384, DType::kBF16, false},  {7, 64, 512, DType::kBF16, true},    {8, 65, 128, DType::kF32, false},
    {9, 48, 1536, DType::kBF16, false}, {31, 80, 640, DType::kF32, true},    {64, 33, 256, DType::kBF16, false},
    {65, 100, 512, DType::kF32, false}, {200, 130, 768, DType::kBF16, true},
};

struct DenseCase {
  int64_t rows, n, k;
  DType in, out;
  bool bias;
};
inline const std::vector<DenseCase> kDenseCases = {
    {1, 16, 2, DType::kF32, DType::kF32, false},      {1, 1, 1, DType::kF32, DType::kF32, true},
    {2, 33, 63, DType::kBF16, DType::kF32, false},    {5, 64, 64, DType::kBF16, DType::kBF16, true},
    {12, 32, 100, DType::kF32, DType::kBF16, false},  {13, 47, 257, DType::kF32, DType::kF32, true},
    {64, 96, 512, DType::kBF16, DType::kF32, false},  {193, 40, 96, DType::kF32, DType::kF32, false},
    {200, 130, 33, DType::kBF16, DType::kBF16, true},
};

// Rows that are coded for a linear: K channels, how many blocks are 8-bit (the first ones), permutation, Hadamard.
struct CodingCase {
  int64_t rows, k;
  bool quantized;
  int64_t wide_blocks;  // 8-bit blocks
  bool perm;
  int64_t hadamard;
  DType dtype;
};
inline const std::vector<CodingCase> kCodingCases = {
    {1, 128, true, 1, false, 0, DType::kBF16},  {1, 128, true, 0, false, 0, DType::kF32},
    {3, 256, true, 1, true, 0, DType::kBF16},   {5, 512, true, 4, false, 0, DType::kBF16},
    {17, 1536, true, 2, true, 0, DType::kF32},  {4, 768, true, 1, true, 256, DType::kBF16},
    {2, 128, true, 0, false, 128, DType::kF32}, {6, 100, false, 0, false, 0, DType::kBF16},
    {6, 37, false, 0, false, 0, DType::kF32},   {300, 256, true, 1, false, 0, DType::kBF16},
    {5, 640, true, 3, false, 0, DType::kBF16},  {3, 8192, true, 5, false, 0, DType::kBF16},
    {2, 14336, true, 9, false, 0, DType::kBF16}, {2, 8192, true, 6, true, 0, DType::kBF16},
    {2, 28672, true, 20, false, 4096, DType::kBF16}, {3, 96, false, 0, true, 32, DType::kBF16},
    {2, 1024, true, 1, true, 2, DType::kBF16},  {2, 2048, true, 0, false, 512, DType::kBF16},
};

struct AttentionCase {
  int64_t q_heads, kv_heads, head_dim;
  KvFormat format;
  DType dtype;
  // One sequence each: how many tokens lie in the cache already and how many rows the step adds.
  std::vector<std::pair<int64_t, int64_t>> sequences;
};
inline const std::vector<AttentionCase> kAttentionCases = {
    {2, 1, 128, KvFormat::kKV4, DType::kBF16, {{0, 1}}},
    {2, 1, 128, KvFormat::kKV4, DType::kBF16, {{62, 1}, {63, 1}, {64, 1}, {65, 1}, {200, 1}}},
    {4, 2, 128, KvFormat::kKV4, DType::kBF16, {{0, 70}, {64, 64}, {10, 1}}},
    {4, 2, 128, KvFormat::kF32, DType::kF32, {{0, 70}, {63, 3}, {128, 1}}},
    {8, 1, 64, KvFormat::kKV4, DType::kBF16, {{31, 40}}},
    {3, 3, 32, KvFormat::kKV4, DType::kF32, {{0, 17}, {100, 2}}},
    {7, 1, 96, KvFormat::kKV4, DType::kBF16, {{130, 5}}},
    {5, 1, 160, KvFormat::kKV4, DType::kF32, {{47, 30}}},
    {2, 2, 256, KvFormat::kKV4, DType::kBF16, {{0, 66}, {15, 1}}},
    {2, 2, 64, KvFormat::kF32, DType::kBF16, {{5, 130}}},
};

}  // namespace nibble::testing
