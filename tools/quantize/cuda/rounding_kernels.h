// What rounding needs on a GPU beside matrix products: plain launch functions, everything on one stream, in device
// memory. Matrices are row-major; columns are in rounding order unless said otherwise. A row belongs to one warp, so a
// row's result depends on nothing but the row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace nibble::cuda {

// to [K, K] = the f32 matrix's entries between the channels at places i and j, + ridge on the diagonal. symmetric: only
// the upper triangle of `from` is read. reversed: place K−1 comes first.
struct GatherArgs {
  const float* from = nullptr;  // [K, K] in channel order
  const int32_t* channel = nullptr;
  int64_t k = 0;
  double ridge = 0;
  bool symmetric = true;
  bool reversed = false;
};
void LaunchGather(cudaStream_t stream, const GatherArgs& args, double* to);
void LaunchGather(cudaStream_t stream, const GatherArgs& args, float* to);

// lower [K, K]: the Cholesky factor of the reversed Hessian, so m_ij = lower[K−1−i][K−1−j]. feedback [K, K] =
// m_ij / m_jj above the diagonal and zero elsewhere; column_weight [K] = m_jj².
void LaunchFeedback(cudaStream_t stream, const double* lower, int64_t k, float* feedback, float* column_weight);

// to [K, K] f32 = from with rows and columns in reverse order.
void LaunchReverse(cudaStream_t stream, const double* from, int64_t k, float* to);

// to [N, K] = the columns `channel` of from [N, K], in channel order.
void LaunchGatherColumns(cudaStream_t stream, const float* from, const int32_t* channel, int64_t n, int64_t k,
                         float* to);

// largest [N] = max |row|, zero below 1e-30 (1/scale would overflow).
void LaunchRowMax(cudaStream_t stream, const float* weight, int64_t n, int64_t k, float* largest);

// step [N] = largest · clip / 119, 1 for a row of zeros.
void LaunchRowStep(cudaStream_t stream, const float* largest, float clip, int64_t n, float* step);

// The rows of a linear while they are rounded.
struct RoundArgs {
  int64_t n = 0, k = 0;
  const float* weight = nullptr;         // [N, K]
  const float* column_weight = nullptr;  // [K]
  const int32_t* group_of = nullptr;     // [K]
  const float* step = nullptr;           // [N] s_w
  float* target = nullptr;               // [N, K]
  float* error = nullptr;                // [N, K]
  uint8_t* codes = nullptr;              // [N, K]
  float* group_scale = nullptr;          // [N, K/128]
  float* group_min = nullptr;            // [N, K/128]
};

// Scale and minimum of group `group` of every row, for its columns at places[0..128).
void LaunchSearchGroup(cudaStream_t stream, const RoundArgs& args, const int32_t* places, int64_t group, bool search);

// Rounds columns [begin, begin + 128); feedback [K, K] or null. loss [N] += Σ column_weight (target − ŵ)².
void LaunchSweep(cudaStream_t stream, const RoundArgs& args, const float* feedback, int64_t begin, float* loss);

// For rows whose loss is below best_loss, or all rows when `first`: copies args' codes, error, scales to `best`'s.
void LaunchTakeBetter(cudaStream_t stream, const RoundArgs& args, const float* loss, bool first, const RoundArgs& best,
                      float* best_step, float* best_loss);

// One round of coordinate descent over columns [begin, begin + 128): residual [N, 128] = error · H[:, block],
// hessian [K, K].
void LaunchRefine(cudaStream_t stream, const RoundArgs& args, const float* hessian, const float* residual,
                  int64_t begin);

// error becomes ŵ = weight − error, and back with the least squares row scale: product [N, K] = ŵ·H.
void LaunchErrorToValue(cudaStream_t stream, const RoundArgs& args);
void LaunchRefitRows(cudaStream_t stream, const RoundArgs& args, const float* product, float* step);

// energy [N] = Σ_j v_j (product_j − ridge v_j) for v [N, K], product = v·H.
void LaunchEnergy(cudaStream_t stream, const float* v, const float* product, double ridge, int64_t n, int64_t k,
                  double* energy);

// Rows whose largest is zero get scale 0 and no error, as the format has it.
void LaunchZeroRows(cudaStream_t stream, const float* largest, int64_t n, int64_t k, float* step, float* error);

// packed [N, K/2], low nibble = even code; place_of [K] says where in the order a code was rounded.
struct PackArgs {
  int64_t n = 0, k = 0;
  const uint8_t* codes = nullptr;
  const int32_t* place_of = nullptr;
  const float* group_scale = nullptr;
  const float* group_min = nullptr;
  uint8_t* packed = nullptr;
  uint8_t* packed_scale = nullptr;  // [N, K/128]
  int8_t* packed_min = nullptr;
};
void LaunchPack(cudaStream_t stream, const PackArgs& args);

}  // namespace nibble::cuda
