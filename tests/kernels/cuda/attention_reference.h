// Attention in float64 over the bytes of CUDA's KV4 pages.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/base/float16.h"
#include "kernels/cuda/attention/kv_page.h"

namespace nibble::cuda {

inline double Bf16Value(uint16_t bits) { return ToFloat(BF16{bits}); }

// K (value = false) or V of one token from the bytes of its (page, head). Returns the span of its codes, 15 · scale.
inline double ReadToken(const uint8_t* head, int head_dim, int token, bool value, double* to) {
  F16 parameters[2];
  std::memcpy(parameters, head + KvParameters(head_dim, token) + 4 * value, 4);
  const double scale = ToFloat(parameters[0]), zero = ToFloat(parameters[1]);
  for (int d = 0; d < head_dim; ++d) {
    const int code = value ? head[VCodeWord(head_dim, token, d / 4 * 4) + d % 4 / 2] >> (d % 2 * 4) & 15
                           : head[KCodeByte(head_dim, token, d)] >> (d % 2 * 4) & 15;
    to[d] = code * scale + zero;
  }
  return 15 * scale;
}

// out[d] of one query head. largest[d]: the largest term of its sum, where probabilities are relative to the largest one
// and a term is what the tensor cores add up, a value without its zero (up to the span) or with it.
inline void ReferenceHead(const std::vector<uint8_t>& cache, int64_t head_bytes, int64_t kv_heads, int64_t kv_head,
                          const int32_t* table, int tokens, int head_dim, const uint16_t* q, double scale, double* out,
                          double* largest) {
  std::vector<double> scores(tokens), x(head_dim);
  const auto head = [&](int token) {
    return cache.data() + (int64_t{table[token / kTokensPerPage]} * kv_heads + kv_head) * head_bytes;
  };
  double high = -INFINITY, sum = 0;
  for (int token = 0; token < tokens; ++token) {
    ReadToken(head(token), head_dim, token % kTokensPerPage, false, x.data());
    double dot = 0;
    for (int d = 0; d < head_dim; ++d) dot += Bf16Value(q[d]) * x[d];
    scores[token] = dot * scale;
    high = std::fmax(high, scores[token]);
  }
  for (int d = 0; d < head_dim; ++d) out[d] = largest[d] = 0;
  for (int token = 0; token < tokens; ++token) {
    const double p = std::exp(scores[token] - high);
    const double span = ReadToken(head(token), head_dim, token % kTokensPerPage, true, x.data());
    sum += p;
    for (int d = 0; d < head_dim; ++d) {
      out[d] += p * x[d];
      largest[d] = std::fmax(largest[d], p * std::fmax(span, std::fabs(x[d])));
    }
  }
  for (int d = 0; d < head_dim; ++d) out[d] /= sum;
}

}  // namespace nibble::cuda
