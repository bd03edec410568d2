// Function-preserving rewrites of a model: the float model computes the same, and quantizes better.
//
// Those of a whole model (norms folded, the residual rotated, value heads rotated) need no data. Those of a layer look
// at what its float form computes on calibration text, and change the statistics along with the weights.
#pragma once

#include <cstdint>
#include <vector>

#include "common/base/thread_pool.h"
#include "common/model/config.h"
#include "tools/quantize/calibration.h"
#include "tools/quantize/dense_layer.h"
#include "tools/quantize/rotation.h"

namespace nibble {

// RMSNorm's weights into the linears that read it: what they read is then x / rms(x), which rotations commute with.
void FoldNorms(DenseLayer* layer);

// R1 (QuaRot, section 4): the residual stream in the basis of `rotation`. Norms are folded already; embedding and head
// are rotated with Rotation::ApplyToRows.
void RotateResidual(const Rotation& rotation, DenseLayer* layer, ThreadPool* pool);

// SmoothAttention (QServe, section 4.2): keys have channels far larger than the rest, which four bits shared by a head
// represent badly. Every RoPE pair of key channels is divided by λ = max|k|^alpha and the queries that meet it are
// multiplied, so q·k is unchanged: the pair shares λ because RoPE mixes it, the query heads of a group because they
// share the key head.
void SmoothAttention(const ModelConfig& config, double alpha, LayerStatistics* statistics, DenseLayer* layer);

// Output smoothing (QServe, section 4.3): channels of o_proj's and down_proj's inputs are divided by λ = x^alpha /
// w^(1 - alpha), their weights multiplied. Folded into v_proj, where one λ serves the query heads that share a value
// channel, and into up_proj. x and w are the largest magnitudes of the channel and of its weights, as in QServe; where
// a Hadamard follows (`heads_rotated`, `down_rotated`), their root mean squares: it spreads a block's energy evenly,
// the error of the output is then proportional to Σ (x/λ)² · Σ (wλ)² over the block, and least at alpha = 1/2.
void SmoothOutputs(const ModelConfig& config, double alpha, bool heads_rotated, bool down_rotated,
                   LayerStatistics* statistics, DenseLayer* layer);

// R2 (QuaRot, section 4): orthonormal Hadamard on every value head and on the o_proj channels of the query heads that
// read it. Attention averages values, so it commutes.
void RotateHeads(const ModelConfig& config, LayerStatistics* statistics, DenseLayer* layer);

// Feed-forward neurons in falling order of what they add to the output, sqrt(E[x²] · Σ_n W_down[n,k]²), dealt in units
// of `unit` neurons to `segments` equal segments in turn, so that tensor-parallel ranks get equal shares. Neighbours
// then share blocks and online Hadamards with neurons of their own size.
void SortNeurons(int64_t segments, int64_t unit, LayerStatistics* statistics, DenseLayer* layer);

// R4 (QuaRot, section 4): down_proj for an input to which the orthonormal block-Hadamard of `size` is applied online.
void RotateDown(int64_t size, LayerStatistics* statistics, DenseLayer* layer);

// The largest power of two up to 512 that divides the shard of the feed-forward dimension at every tensor-parallel size
// that a checkpoint loads at.
int64_t DownHadamardSize(const ModelConfig& config);

}  // namespace nibble
