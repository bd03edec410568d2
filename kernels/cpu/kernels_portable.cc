// The kernels in plain C++.
#include "kernels/cpu/kernels_std.h"

#define NIBBLE_ISA portable
#include "kernels/cpu/vec_portable.h"

namespace nibble::portable {

inline constexpr Isa kIsa = Isa::kPortable;
inline constexpr char kIsaName[] = "portable";
inline constexpr int kW4Rows = 4, kW4Tiles = 1, kW4FewRows = 1, kW4FewRowsTiles = 1;
inline constexpr int kDenseRows = 4, kDenseTiles = 1, kDenseFewRows = 1, kDenseFewRowsTiles = 1;
inline constexpr int kAttentionSums = 4;

template <int kRows, int kTiles>
inline void W4GroupDots(const int8_t* x, int64_t stride, const uint8_t* const* codes, IVec dots[kRows][kTiles]) {
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kTiles; ++j) {
      IVec sum = IVec::Zero();
      for (int64_t v = 0; v < kTileGroupBytes / 64; ++v) {
        const int8_t* low = x + r * stride + v * 8;
        for (int64_t i = 0; i < 64; ++i) {
          const int32_t byte = codes[j][v * 64 + i];
          sum.v[i / 4] += (byte & 15) * low[i % 4] + (byte >> 4) * low[4 + i % 4];
        }
      }
      dots[r][j] = sum;
    }
  }
}

}  // namespace nibble::portable

#include "kernels/cpu/kernels_inl.h"
