// Linear layers. Both forms work on tiles of sixteen output features, one per lane, blocked over rows in registers.
//
// W4: Σ_k x8 · (q4 · s2 + m) = Σ_groups (s2 · Σ x8 · q4 + m · Σ x8): the inner sums run on the 4-bit codes as they lie
// in memory, unsigned times signed, and the group's scale and minimum cost one multiply-add per 128 products. All of it
// is exact in int32, so any order gives the same bits. (The regrouping is QServe's, section 5.2 of arXiv 2405.04532,
// there for the zero point of the second level.)
//
// Dense: every output is one chain of fused multiply-adds over k = 0, 1, 2, ..., whatever the blocking.
#pragma once

namespace nibble::NIBBLE_ISA {

// Writes one tile's sixteen results of a row; the last tile of a weight may hold fewer.
inline void StoreTile(Vec y, const float* bias, int64_t n, const Rows& out, int64_t row) {
  const int64_t count = out.cols - n < kTileN ? out.cols - n : kTileN;
  const int64_t at = row * out.cols + n;
  if (count == kTileN) {
    if (bias != nullptr) y = y + Vec::Load(bias + n);
    if (out.dtype == DType::kF32) {
      y.Store(static_cast<float*>(out.data) + at);
    } else {
      y.StoreBF16(static_cast<BF16*>(out.data) + at);
    }
    return;
  }
  float lanes[kLanes];
  y.Store(lanes);
  for (int64_t i = 0; i < count; ++i) {
    const float value = bias == nullptr ? lanes[i] : lanes[i] + bias[n + i];
    if (out.dtype == DType::kF32) {
      static_cast<float*>(out.data)[at + i] = value;
    } else {
      static_cast<BF16*>(out.data)[at + i] = ToBF16(value);
    }
  }
}

void GroupSums(const int8_t* codes, int64_t groups, int32_t* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) sum += codes[g * kBlock + i];
    sums[g] = sum;
  }
}

// ---- W4 ------------------------------------------------------------------------------------------------------------

// kRows rows × kTiles tiles. W4GroupDots, per instruction set: dots[r][j] = Σ over the group of x8 · q4.
template <int kRows, int kTiles>
void W4Block(const W4Problem& p, int64_t row, int64_t tile) {
  const W4Weight& w = *p.weight;
  const int64_t groups = w.groups;
  const uint8_t* codes[kTiles];
  const uint8_t* scale[kTiles];
  const int8_t* minimum[kTiles];
  for (int j = 0; j < kTiles; ++j) {
    codes[j] = w.codes.as<uint8_t>() + (tile + j) * groups * kTileGroupBytes;
    scale[j] = w.group_scale.as<uint8_t>() + (tile + j) * groups * kTileN;
    minimum[j] = w.group_min.as<int8_t>() + (tile + j) * groups * kTileN;
  }
  IVec total[kRows][kTiles];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kTiles; ++j) total[r][j] = IVec::Zero();
  }
  for (int64_t g = 0; g < groups; ++g) {
    IVec dots[kRows][kTiles];
    W4GroupDots<kRows, kTiles>(p.codes + row * w.k + g * kBlock, w.k, codes, dots);
    for (int j = 0; j < kTiles; ++j) {
      const IVec s = IVec::LoadU8(scale[j] + g * kTileN);
      const IVec m = IVec::LoadI8(minimum[j] + g * kTileN);
      for (int r = 0; r < kRows; ++r) {
        total[r][j] = total[r][j] + dots[r][j] * s + m * IVec::Set(p.group_sums[(row + r) * groups + g]);
      }
      codes[j] += kTileGroupBytes;
    }
  }
  for (int j = 0; j < kTiles; ++j) {
    const Vec channel = Vec::Load(w.channel_scale.as<float>() + (tile + j) * kTileN);
    for (int r = 0; r < kRows; ++r) {
      const Vec y = ToFloat(total[r][j]) * (Vec::Set(p.scales[row + r]) * channel);
      StoreTile(y, p.bias, (tile + j) * kTileN, p.out, row + r);
    }
  }
}

using W4BlockFn = void (*)(const W4Problem&, int64_t, int64_t);
template <int kTiles, int... kRows>
constexpr std::array<W4BlockFn, sizeof...(kRows)> MakeW4Blocks(std::integer_sequence<int, kRows...>) {
  return {&W4Block<kRows + 1, kTiles>...};
}

void W4Linear(const W4Problem& p, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  static constexpr auto kNarrow = MakeW4Blocks<1>(std::make_integer_sequence<int, kW4Rows>());
  static constexpr auto kWide = MakeW4Blocks<kW4Tiles>(std::make_integer_sequence<int, kW4Rows>());
  static constexpr auto kWidest = MakeW4Blocks<kW4FewRowsTiles>(std::make_integer_sequence<int, kW4FewRows>());
  for (int64_t tile = tile_begin; tile < tile_end;) {
    const int64_t left = tile_end - tile;
    int64_t tiles = left >= kW4Tiles ? kW4Tiles : 1;
    if (row_end - row_begin <= kW4FewRows && left >= kW4FewRowsTiles) tiles = kW4FewRowsTiles;
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t rows = row_end - row < kW4Rows ? row_end - row : kW4Rows;
      if (tiles == kW4FewRowsTiles && rows <= kW4FewRows) {
        kWidest[rows - 1](p, row, tile);
      } else if (tiles == kW4Tiles) {
        kWide[rows - 1](p, row, tile);
      } else {
        kNarrow[rows - 1](p, row, tile);
      }
      row += rows;
    }
    tile += tiles;
  }
}

// ---- dense ---------------------------------------------------------------------------------------------------------

template <int kRows, int kTiles>
void DenseBlock(const DenseProblem& p, int64_t row, int64_t tile) {
  const int64_t k = p.weight->k, pairs = CeilDiv(k, 2);
  const float* x = p.in + row * k;
  const BF16* w = p.weight->data.as<BF16>() + tile * pairs * 2 * kTileN;
  Vec sum[kRows][kTiles];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) sum[r][j] = Vec::Zero();
  }
  for (int64_t pair = 0; pair < k / 2; ++pair) {
    // Even and odd one after the other: half as many registers hold weights.
    Vec weight[kTiles];
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
      weight[j] = FromBits(ShiftLeft<16>(IVec::Load(w + (j * pairs + pair) * 2 * kTileN)));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x0 = Vec::Set(x[r * k + 2 * pair]);
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) sum[r][j] = Fma(x0, weight[j], sum[r][j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
      weight[j] =
          FromBits(IVec::Load(w + (j * pairs + pair) * 2 * kTileN) & IVec::Set(static_cast<int32_t>(0xffff0000)));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x1 = Vec::Set(x[r * k + 2 * pair + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) sum[r][j] = Fma(x1, weight[j], sum[r][j]);
    }
  }
  if (k % 2 != 0) {
    for (int j = 0; j < kTiles; ++j) {
      const Vec last = FromBits(ShiftLeft<16>(IVec::Load(w + (j * pairs + k / 2) * 2 * kTileN)));
      for (int r = 0; r < kRows; ++r) sum[r][j] = Fma(Vec::Set(x[r * k + k - 1]), last, sum[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) StoreTile(sum[r][j], p.bias, (tile + j) * kTileN, p.out, row + r);
  }
}

using DenseBlockFn = void (*)(const DenseProblem&, int64_t, int64_t);
template <int kTiles, int... kRows>
constexpr std::array<DenseBlockFn, sizeof...(kRows)> MakeDenseBlocks(std::integer_sequence<int, kRows...>) {
  return {&DenseBlock<kRows + 1, kTiles>...};
}

void DenseLinear(const DenseProblem& p, int64_t row_begin, int64_t row_end, int64_t tile_begin, int64_t tile_end) {
  static constexpr auto kNarrow = MakeDenseBlocks<1>(std::make_integer_sequence<int, kDenseRows>());
  static constexpr auto kWide = MakeDenseBlocks<kDenseTiles>(std::make_integer_sequence<int, kDenseRows>());
  static constexpr auto kWidest = MakeDenseBlocks<kDenseFewRowsTiles>(std::make_integer_sequence<int, kDenseFewRows>());
  for (int64_t tile = tile_begin; tile < tile_end;) {
    const int64_t left = tile_end - tile;
    int64_t tiles = left >= kDenseTiles ? kDenseTiles : 1;
    if (row_end - row_begin <= kDenseFewRows && left >= kDenseFewRowsTiles) tiles = kDenseFewRowsTiles;
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t rows = row_end - row < kDenseRows ? row_end - row : kDenseRows;
      if (tiles == kDenseFewRowsTiles && rows <= kDenseFewRows) {
        kWidest[rows - 1](p, row, tile);
      } else if (tiles == kDenseTiles) {
        kWide[rows - 1](p, row, tile);
      } else {
        kNarrow[rows - 1](p, row, tile);
      }
      row += rows;
    }
    tile += tiles;
  }
}

}  // namespace nibble::NIBBLE_ISA
