// Operators that work row by row: residual + norm, SiLU · up, Hadamard, permutation and coding of a linear's input.
// A row lives in scratch as f32, padded with zeros to whole blocks, so that every sum is taken in the one order of
// BlockSum whatever the row's length.
#pragma once

#include "kernels/cpu/math_inl.h"

namespace nibble::NIBBLE_ISA {

inline int64_t PaddedFloats(int64_t n) { return CeilDiv(n, kBlock) * kBlock; }
// A row's two buffers and what LoadOctets reads past the end of the second.
inline float* ReserveRows(Scratch* scratch, int64_t n) {
  return static_cast<float*>(scratch->Reserve((2 * PaddedFloats(n) + kLanes) * sizeof(float)));
}

// Lane j of octets[w] = x[8 j + w]: the order in which a block of 128 is summed. Each of sixteen lanes takes eight
// neighbouring channels one after the other, and ReduceAdd's tree joins the lanes. A GPU thread can load eight
// neighbours at once, so it can follow this order, which it could not if neighbours went to different lanes.
inline constexpr int kOctet = static_cast<int>(kBlock) / kLanes;
inline void LoadOctets(const float* x, Vec octets[kOctet]) {
  IVec words[kLanes];  // the upper eight are the neighbours' and not used
  TransposeWords(reinterpret_cast<const uint8_t*>(x), kOctet * sizeof(float), words);
  for (int w = 0; w < kOctet; ++w) octets[w] = FromBits(words[w]);
}

// Σ x² over a padded row: of each block in the order of LoadOctets; then lane b % 16 adds the sums of blocks b, in
// order, and the lanes are joined by the same tree.
inline float SumOfSquares(const float* x, int64_t padded) {
  float lanes[kLanes] = {};
  for (int64_t b = 0; b < padded / kBlock; ++b) {
    Vec octets[kOctet], squares = Vec::Zero();
    LoadOctets(x + b * kBlock, octets);
    for (const Vec v : octets) squares = Fma(v, v, squares);
    lanes[b % kLanes] += ReduceAdd(squares);
  }
  return ReduceAdd(Vec::Load(lanes));
}

// Columns [begin, begin + count) of a row, as f32.
inline void LoadValues(const Rows& rows, int64_t row, int64_t begin, int64_t count, float* to) {
  const int64_t whole = count / kLanes * kLanes;
  const int64_t at = row * rows.cols + begin;
  if (rows.dtype == DType::kF32) {
    std::memcpy(to, static_cast<const float*>(rows.data) + at, count * sizeof(float));
    return;
  }
  const BF16* from = static_cast<const BF16*>(rows.data) + at;
  for (int64_t i = 0; i < whole; i += kLanes) Vec::LoadBF16(from + i).Store(to + i);
  for (int64_t i = whole; i < count; ++i) to[i] = ToFloat(from[i]);
}
// The same, zero-padded to whole blocks.
inline void LoadRow(const Rows& rows, int64_t row, int64_t begin, int64_t count, float* to) {
  std::fill(to + count, to + PaddedFloats(count), 0.0f);
  LoadValues(rows, row, begin, count, to);
}

inline void StoreRow(const float* from, const Rows& rows, int64_t row, int64_t begin, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  const int64_t at = row * rows.cols + begin;
  if (rows.dtype == DType::kF32) {
    std::memcpy(static_cast<float*>(rows.data) + at, from, count * sizeof(float));
    return;
  }
  BF16* to = static_cast<BF16*>(rows.data) + at;
  for (int64_t i = 0; i < whole; i += kLanes) Vec::Load(from + i).StoreBF16(to + i);
  for (int64_t i = whole; i < count; ++i) to[i] = ToBF16(from[i]);
}

// Orthonormal Walsh-Hadamard transform of consecutive blocks of `size` (a power of two that divides k): butterflies of
// distance 1, 2, 4, ..., then one product with 1/sqrt(size).
inline void Hadamard(float* x, int64_t k, int64_t size) {
  for (int64_t distance = 1; distance < size; distance *= 2) {
    for (int64_t begin = 0; begin < k; begin += 2 * distance) {
      for (int64_t i = begin; i < begin + distance; ++i) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(size));
  for (int64_t i = 0; i < k; ++i) x[i] *= scale;
}

// Largest magnitude of 128 floats. Compared as integers, NaN is larger than infinity: a row that holds one gets a NaN
// scale, so the fault stays visible downstream.
inline float BlockMax(const float* x) {
  IVec m = IVec::Zero();
  for (int64_t i = 0; i < kBlock; i += kLanes) m = Max(Bits(Vec::Load(x + i)) & IVec::Set(0x7fffffff), m);
  return std::bit_cast<float>(ReduceMax(m));
}
inline float MaxMagnitude(float a, float b) {
  return std::bit_cast<uint32_t>(a) > std::bit_cast<uint32_t>(b) ? a : b;  // both non-negative or NaN
}

// Values in units of the row's scale, coded with an exponent: round(u / 2^e) clamped to ±limit, times 2^e.
struct BlockCode {
  BlockCode(int exponent, float most)
      : up(Vec::Set(static_cast<float>(1 << exponent))),
        down(Vec::Set(1.0f / static_cast<float>(1 << exponent))),  // powers of two: both products are exact
        limit(Vec::Set(most)) {}
  Vec operator()(Vec u) const {
    return Min(limit, Max(RoundEven(u * down), Vec::Zero() - limit)) * up;
  }

  Vec up, down, limit;
};

inline float SquaredError(const Vec u[kOctet], const BlockCode& code) {
  Vec error = Vec::Zero();
  for (int w = 0; w < kOctet; ++w) {
    const Vec difference = u[w] - code(u[w]);
    error = Fma(difference, difference, error);
  }
  return ReduceAdd(error);
}

// Writes the codes of a block and returns their sum.
inline int32_t CodeBlock(const float* u, const BlockCode& code, int8_t* codes) {
  IVec total = IVec::Zero();
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const IVec values = ToInt(code(Vec::Load(u + i)));
    values.StoreI8(codes + i);
    total = total + values;
  }
  return ReduceAdd(total);
}

// The exponent of a 4-bit block (docs/numerics.md): the smallest e with max <= 7 · 2^e, or e - 1, which saturates the
// largest values but rounds the others finer. Equal errors keep e.
inline int ChooseExponent(const float* u) {
  const float u_max = BlockMax(u);
  int e = 0;
  while (e < 4 && u_max > 7.0f * static_cast<float>(1 << e)) ++e;
  if (e == 0) return 0;
  Vec octets[kOctet];
  LoadOctets(u, octets);
  return SquaredError(octets, BlockCode(e - 1, 7.0f)) < SquaredError(octets, BlockCode(e, 7.0f)) ? e - 1 : e;
}

// Writes row `row` of the next linear's input from x [K, padded]; `spare` holds as many floats.
inline void CodeRow(float* x, float* spare, const InputCoding& coding, const LinearInput& out, int64_t row) {
  const int64_t k = coding.k;
  if (coding.hadamard > 1) Hadamard(x, k, coding.hadamard);
  if (coding.perm != nullptr) {
    for (int64_t i = 0; i < k; ++i) spare[i] = x[coding.perm[i]];
    std::swap(x, spare);
  }
  if (!coding.quantized) {
    StoreRow(x, out.dense, row, 0, k);
    return;
  }
  const int64_t blocks = k / kBlock;
  float scale = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    scale = MaxMagnitude(BlockMax(x + b * kBlock) / (coding.block_bits[b] == 8 ? 127.0f : 112.0f), scale);
  }
  int8_t* codes = out.codes + row * k;
  uint8_t* exponents = out.exponents == nullptr ? nullptr : out.exponents + row * blocks;
  int32_t sum = 0;
  if (scale == 0.0f) {
    std::memset(codes, 0, k);
    if (exponents != nullptr) std::memset(exponents, 0, blocks);
  } else {
    for (int64_t i = 0; i < k; i += kLanes) (Vec::Load(x + i) / Vec::Set(scale)).Store(x + i);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* u = x + b * kBlock;
      int exponent = 0;
      if (coding.block_bits[b] == 8) {
        sum += CodeBlock(u, BlockCode(0, 127.0f), codes + b * kBlock);
      } else {
        exponent = ChooseExponent(u);
        sum += CodeBlock(u, BlockCode(exponent, 7.0f), codes + b * kBlock);
      }
      if (exponents != nullptr) exponents[b] = static_cast<uint8_t>(exponent);
    }
  }
  out.scales[row] = scale;
  if (out.code_sums != nullptr) out.code_sums[row] = sum;
}

void AddDelta(const AddNormQuantizeArgs& args, int64_t row) {
  const Rows& r = args.residual;
  const int64_t at = row * r.cols;
  if (r.dtype == DType::kF32) {
    float* x = static_cast<float*>(r.data) + at;
    if (args.delta->dtype == DType::kF32) {
      const float* delta = static_cast<const float*>(args.delta->data) + at;
      for (int64_t i = 0; i < r.cols; ++i) x[i] = x[i] + delta[i];
    } else {
      const BF16* delta = static_cast<const BF16*>(args.delta->data) + at;
      for (int64_t i = 0; i < r.cols; ++i) x[i] = x[i] + ToFloat(delta[i]);
    }
    return;
  }
  BF16* x = static_cast<BF16*>(r.data) + at;
  if (args.delta->dtype == DType::kBF16) {
    const BF16* delta = static_cast<const BF16*>(args.delta->data) + at;
    int64_t i = 0;
    for (; i + kLanes <= r.cols; i += kLanes) (Vec::LoadBF16(x + i) + Vec::LoadBF16(delta + i)).StoreBF16(x + i);
    for (; i < r.cols; ++i) x[i] = ToBF16(ToFloat(x[i]) + ToFloat(delta[i]));
  } else {
    const float* delta = static_cast<const float*>(args.delta->data) + at;
    int64_t i = 0;
    for (; i + kLanes <= r.cols; i += kLanes) (Vec::LoadBF16(x + i) + Vec::Load(delta + i)).StoreBF16(x + i);
    for (; i < r.cols; ++i) x[i] = ToBF16(ToFloat(x[i]) + delta[i]);
  }
}

void AddNorm(const AddNormQuantizeArgs& args, int64_t row, Scratch* scratch) {
  const int64_t h = args.residual.cols, padded = PaddedFloats(h);
  float* x = ReserveRows(scratch, h);
  float* spare = x + padded;
  int64_t from = row;
  if (args.row_index != nullptr) {
    from = args.row_index[row];
    NIBBLE_CHECK(from >= 0 && from < args.residual.rows,
                 "row_index " + std::to_string(from) + " of " + std::to_string(args.residual.rows) + " rows");
  }
  LoadRow(args.residual, from, 0, h, x);
  const float mean = SumOfSquares(x, padded) / static_cast<float>(h);
  const float inverse = 1.0f / std::sqrt(mean + args.eps);
  int64_t i = 0;
  for (; i + kLanes <= h; i += kLanes) {
    (Vec::Load(x + i) * Vec::LoadBF16(args.weight + i) * Vec::Set(inverse)).Store(x + i);
  }
  for (; i < h; ++i) x[i] = x[i] * ToFloat(args.weight[i]) * inverse;
  CodeRow(x, spare, *args.coding, *args.out, row);
}

void QuantizeRow(const QuantizeArgs& args, int64_t row, Scratch* scratch) {
  const int64_t padded = PaddedFloats(args.in.cols);
  float* x = ReserveRows(scratch, args.in.cols);
  LoadRow(args.in, row, 0, args.in.cols, x);
  CodeRow(x, x + padded, *args.coding, *args.out, row);
}

void SiluMul(const SiluMulQuantizeArgs& args, int64_t row, Scratch* scratch) {
  const int64_t f = args.gate_up.cols / 2, padded = PaddedFloats(f);
  float* gate = ReserveRows(scratch, f);
  float* up = gate + padded;
  LoadRow(args.gate_up, row, 0, f, gate);
  LoadRow(args.gate_up, row, f, f, up);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec g = Vec::Load(gate + i);
    Vec h = g * Sigmoid(g) * Vec::Load(up + i);
    if (args.gate_up.dtype == DType::kBF16) {
      BF16 rounded[kLanes];
      h.StoreBF16(rounded);
      h = Vec::LoadBF16(rounded);
    }
    h.Store(gate + i);
  }
  CodeRow(gate, up, *args.coding, *args.out, row);
}

void Widen(const BF16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Vec::LoadBF16(from + i).Store(to + i);
  for (; i < count; ++i) to[i] = ToFloat(from[i]);
}

}  // namespace nibble::NIBBLE_ISA
