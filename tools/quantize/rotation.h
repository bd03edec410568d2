// Orthogonal matrices that are cheap to apply: signs, a basis, Hadamard and Hartley blocks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common/base/thread_pool.h"

namespace nibble {

// Orthonormal Hadamard transform of consecutive blocks of `size` (a power of two that divides the row), as
// InputCoding.hadamard does it online. Its own inverse.
void HadamardBlocks(int64_t size, std::span<float> row);

// The largest power of two that divides n.
int64_t PowerOfTwoPart(int64_t n);

// An orthogonal matrix R [K, K] acting on rows: x becomes x·R. R is basis · signs · (one mixing matrix per part), where
// a part of m·2^k channels, m odd, is mixed by Hartley(m) ⊗ Hadamard(2^k): entries of one magnitude (Hadamard) or
// nearly so for any size (QuaRot, section 4, takes tabulated Hadamard matrices for the odd factor).
class Rotation {
 public:
  // Random signs, then one part of all K channels.
  static Rotation Hadamard(int64_t k, uint64_t seed);

  // Columns of `basis` [K, K], orthonormal, then random signs, then two parts: the first `leading` channels and the
  // rest. So every direction of the leading subspace stays in the leading channels, spread evenly.
  static Rotation Principal(std::vector<float> basis, int64_t k, int64_t leading, uint64_t seed);

  int64_t k() const { return static_cast<int64_t>(signs_.size()); }
  std::span<const float> basis() const { return basis_; }

  // Every row of x [rows, K]: x·R.
  void ApplyToRows(std::span<float> x, ThreadPool* pool) const;

  // Every column of x [K, columns]: Rᵀ·x.
  void ApplyToColumns(std::span<float> x, int64_t columns, ThreadPool* pool) const;

 private:
  Rotation() = default;
  void Mix(std::span<float> row) const;

  std::vector<float> basis_;  // [K, K] or empty
  std::vector<float> signs_;  // [K] ±1
  std::vector<int64_t> parts_;
};

// An orthonormal basis [K, K] (columns) whose first `leading` columns span, nearly, the directions in which the
// symmetric `moments` [K, K] is largest: orthogonal iteration from a random start, then any orthonormal complement.
std::vector<float> PrincipalBasis(std::span<const float> moments, int64_t k, int64_t leading, uint64_t seed,
                                  ThreadPool* pool);

}  // namespace nibble
