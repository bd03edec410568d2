// Dense linear algebra of the quantizer on CPUs. Matrices are row-major. Every sum has one fixed order, whatever the
// number of threads and the instruction set, so a checkpoint is a pure function of model, text and options.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "common/base/thread_pool.h"

namespace nibble {

// gram [K, K] += xᵀ·x for x [rows, K]: the upper triangle (column >= row); what is below is left as it was. f32 sums
// in chunks of rows, so that the error grows with the number of chunks and not of rows.
void AccumulateGram(std::span<const float> x, int64_t k, std::span<float> gram, ThreadPool* pool);

// product [K, K] += xᵀ·y for x, y [rows, K].
void AccumulateProduct(std::span<const float> x, std::span<const float> y, int64_t k, std::span<float> product,
                       ThreadPool* pool);

// Copies the upper triangle onto the lower one.
void MirrorUpper(int64_t k, std::span<float> matrix);

// Overwrites the symmetric positive definite a [K, K] (upper triangle read) by the UPPER triangular m with a = m·mᵀ:
// Cholesky from the last row to the first; zeros below the diagonal. FAILED_PRECONDITION when a pivot is not positive
// (a is not positive definite in f64), naming the row; a is then undefined.
absl::Status UpperCholesky(int64_t k, std::span<double> a, ThreadPool* pool);

// Overwrites the rows of b [N, K] by x with x·(m·mᵀ) = b, m as UpperCholesky leaves it.
void SolveRows(int64_t k, std::span<const double> m, std::span<double> b, ThreadPool* pool);

}  // namespace nibble
