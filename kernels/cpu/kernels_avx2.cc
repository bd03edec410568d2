// The kernels for x86-64 with AVX2, FMA and F16C.
#include <immintrin.h>

#include "kernels/cpu/kernels_std.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define NIBBLE_ISA avx2
#include "kernels/cpu/vec_avx2.h"

namespace nibble::avx2 {

inline constexpr Isa kIsa = Isa::kAvx2;
inline constexpr char kIsaName[] = "avx2";
inline constexpr int kW4Rows = 4, kW4Tiles = 1, kW4FewRows = 1, kW4FewRowsTiles = 2;
inline constexpr int kDenseRows = 5, kDenseTiles = 1, kDenseFewRows = 2, kDenseFewRowsTiles = 2;
inline constexpr int kAttentionSums = 4;

// VPMADDUBSW adds two products of unsigned and signed bytes with saturation at 16 bits: with full 8-bit weights it
// could overflow; a 4-bit code times an activation is at most 15 · 127, and even eight such pairs stay below 2^15
// (30,480). So eight of them are added in 16 bits before one VPMADDWD widens the sum.
// Not inlined: on its own it gets all sixteen registers, among what surrounds it GCC spills.
template <int kRows, int kTiles>
[[gnu::noinline]] void W4GroupDots(const int8_t* x, int64_t stride, const uint8_t* const* codes,
                                   IVec dots[kRows][kTiles]) {
  static_assert(8 * 2 * 15 * 127 < 32768);
  const __m256i low_nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int j = 0; j < kTiles; ++j) {
    for (int r = 0; r < kRows; ++r) dots[r][j] = IVec::Zero();
    for (int half = 0; half < 2; ++half) {
      __m256i sum[kRows];
      for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_si256();
      for (int64_t quarter = 0; quarter < 4; ++quarter) {
        __m256i words[kRows];
        for (int r = 0; r < kRows; ++r) words[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int64_t v = 4 * quarter; v < 4 * quarter + 4; ++v) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes[j] + v * 64 + half * 32));
          const __m256i low = _mm256_and_si256(both, low_nibble);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_nibble);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            int32_t x_low, x_high;
            std::memcpy(&x_low, x + r * stride + v * 8, 4);
            std::memcpy(&x_high, x + r * stride + v * 8 + 4, 4);
            words[r] = _mm256_add_epi16(words[r], _mm256_maddubs_epi16(low, _mm256_set1_epi32(x_low)));
            words[r] = _mm256_add_epi16(words[r], _mm256_maddubs_epi16(high, _mm256_set1_epi32(x_high)));
          }
        }
        for (int r = 0; r < kRows; ++r) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(words[r], ones));
      }
      for (int r = 0; r < kRows; ++r) (half == 0 ? dots[r][j].lo : dots[r][j].hi) = sum[r];
    }
  }
}

}  // namespace nibble::avx2

#include "kernels/cpu/kernels_inl.h"
#pragma GCC pop_options
