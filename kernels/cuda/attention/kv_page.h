// The inner order of a (page, KV head) of the CUDA backend: KvLayout::head_bytes() bytes, as in the specification, but
// arranged so that a warp reads the operands of its tensor-core steps with whole, conflict-free 16-byte (D = 128) or
// 8-byte (D = 64) loads from consecutive addresses. Host and device functions; no CUDA types.
//
// KV4, D = head_dim, lane bytes L = D / 8 (docs/kernels-attention.md has the picture):
//   [0, 32 D)      K codes: token t's D/2 bytes at t · D/2, low nibble = even d
//   [32 D, 64 D)   V codes: 8 blocks of 8 tokens, 4 D bytes each. The 16-bit word of (token t, channels 4x .. 4x + 3),
//                  low nibble first, lies next to that of the other token of its pair (t ^ 1), so that the 32-bit word
//                  masked with 0x000f000f holds two tokens of one channel: an operand register of P · V.
//   [64 D, +512)   per token four f16: K scale, K zero, V scale, V zero
// F32: K [64, D], V [64, D], as in the specification.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda {

inline constexpr int kTokensPerPage = 64;

// Offset of the byte that holds K's code of channel d (its low nibble when d is even).
NIBBLE_HOST_DEVICE constexpr int KCodeByte(int head_dim, int token, int d) { return token * head_dim / 2 + d / 2; }

// Offset of the 16-bit word that holds V's codes of channels d .. d + 3, d a multiple of 4.
NIBBLE_HOST_DEVICE constexpr int VCodeWord(int head_dim, int token, int d) {
  const int lane_channels = head_dim / 8, lane_bytes = head_dim / 8;
  return 32 * head_dim + token / 8 * 4 * head_dim + d / lane_channels * 4 * lane_bytes + token % 8 / 2 * lane_bytes +
         d % lane_channels / 4 * 4 + token % 2 * 2;
}

// Offset of a token's four f16 parameters.
NIBBLE_HOST_DEVICE constexpr int KvParameters(int head_dim, int token) { return 64 * head_dim + token * 8; }

// Re-orders one (page, head) of KV4 to the specification's order (kernels/ops.h, KvLayout): for tests and tools.
inline void KvPageToSpecification(int head_dim, const uint8_t* from, uint8_t* to) {
  const int half = 32 * head_dim + 4 * kTokensPerPage;
  for (int token = 0; token < kTokensPerPage; ++token) {
    for (int d = 0; d < head_dim; d += 2) {
      to[token * head_dim / 2 + d / 2] = from[KCodeByte(head_dim, token, d)];
      const int word = VCodeWord(head_dim, token, d / 4 * 4);
      to[half + token * head_dim / 2 + d / 2] = from[word + d % 4 / 2];
    }
    for (int i = 0; i < 2; ++i) {  // bytes of an f16
      const uint8_t* parameters = from + KvParameters(head_dim, token) + i;
      uint8_t* k = to + 32 * head_dim + token * 2 + i;
      k[0] = parameters[0];
      k[2 * kTokensPerPage] = parameters[2];
      k[half] = parameters[4];
      k[half + 2 * kTokensPerPage] = parameters[6];
    }
  }
}

}  // namespace nibble::cuda
