// Warp-wide integer matrix multiply-accumulate (PTX ISA 9.7.14), sm_80. Lane 4g + c holds of c[16, 8]: columns 2c, 2c + 1
// of row g, then of row g + 8.
#pragma once

#include <cstdint>

namespace nibble::cuda {

// c += a[16, 64] · b[64, 8], unsigned by signed 4-bit elements, eight to a register, the first in the lowest bits. Lane
// 4g + c holds elements 8c..8c+7 of rows g and g + 8 of a (a0, a1) and elements 32 + 8c.. of the same rows (a2, a3); of
// column g of b elements 8c.. (b0) and 32 + 8c.. (b1). The tensor cores of sm_80 to sm_89 do this in one instruction;
// later ones have none for it, and the compiler writes some 180 others instead.
__device__ __forceinline__ void MmaU4S4(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += a[16, 32] · b[32, 8], signed 8-bit elements, four to a register: elements 4c..4c+3 of rows g and g + 8 (a0, a1),
// elements 16 + 4c.. of them (a2, a3), and of column g of b elements 4c.. (b0) and 16 + 4c.. (b1).
__device__ __forceinline__ void MmaS8(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace nibble::cuda
