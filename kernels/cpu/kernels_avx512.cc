// The kernels for x86-64 with AVX-512 F, BW, VL, DQ and VNNI.
// GCC 12 and 13 warn about the deliberately undefined operands inside their own AVX-512 headers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/cpu/kernels_std.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define NIBBLE_ISA avx512vnni
#include "kernels/cpu/vec_avx512.h"

namespace nibble::avx512vnni {

inline constexpr Isa kIsa = Isa::kAvx512Vnni;
inline constexpr char kIsaName[] = "avx512vnni";
inline constexpr int kW4Rows = 8, kW4Tiles = 2, kW4FewRows = 2, kW4FewRowsTiles = 4;
inline constexpr int kDenseRows = 12, kDenseTiles = 2, kDenseFewRows = 2, kDenseFewRowsTiles = 4;
inline constexpr int kAttentionSums = 16;

// VPDPBUSD: unsigned codes times signed activations, four products per lane, added in 32 bits.
template <int kRows, int kTiles>
inline void W4GroupDots(const int8_t* x, int64_t stride, const uint8_t* const* codes, IVec dots[kRows][kTiles]) {
  const __m512i low_nibble = _mm512_set1_epi8(15);
  __m512i sum[kRows][kTiles];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) sum[r][j] = _mm512_setzero_si512();
  }
  for (int64_t v = 0; v < kTileGroupBytes / 64; ++v) {
    __m512i low[kTiles], high[kTiles];
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) {
      const __m512i both = _mm512_loadu_si512(codes[j] + v * 64);
      low[j] = _mm512_and_si512(both, low_nibble);
      high[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_nibble);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i x_low = _mm512_broadcastd_epi32(_mm_loadu_si32(x + r * stride + v * 8));
      const __m512i x_high = _mm512_broadcastd_epi32(_mm_loadu_si32(x + r * stride + v * 8 + 4));
#pragma GCC unroll 4
      for (int j = 0; j < kTiles; ++j) {
        sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], low[j], x_low);
        sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], high[j], x_high);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTiles; ++j) dots[r][j].v = sum[r][j];
  }
}

}  // namespace nibble::avx512vnni

#include "kernels/cpu/kernels_inl.h"
#pragma GCC pop_options
