#include "tools/quantize/tile_kernels.h"

// Vectors are passed to functions that are inlined only: no binary interface is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"

#define NIBBLE_ISA portable_tiles
#include "tools/quantize/tile_kernels_inl.h"
#undef NIBBLE_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define NIBBLE_ISA avx2_tiles
#include "tools/quantize/tile_kernels_inl.h"
#undef NIBBLE_ISA
#pragma GCC pop_options
#endif

namespace nibble {

int64_t TileScratchFloats(int64_t k) { return kPanel * (128 + kPanel + 3 * k + 2 * (k / 128)); }

const TileKernels& PortableTileKernels() { return portable_tiles::kTileKernels; }

const TileKernels& BestTileKernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return avx2_tiles::kTileKernels;
#endif
  return PortableTileKernels();
}

}  // namespace nibble
