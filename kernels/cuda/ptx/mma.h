// Warp-wide matrix multiply-accumulate and the operations around it (PTX ISA 9.7.14).
#pragma once

#include <cstdint>

namespace nibble::cuda {

// c[16, 8] += a[16, 16] · b[16, 8], f16 operands, f32 accumulators. Lane 4g + t holds of a: rows g and g + 8 (a[0],
// a[1]) of columns 2t, 2t + 1, and the same rows of columns 2t + 8, 2t + 9 (a[2], a[3]); of b: rows 2t, 2t + 1 and
// 2t + 8, 2t + 9 of column g; of c: columns 2t, 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void MmaF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with bf16 operands.
__device__ __forceinline__ void MmaBF16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements; lane 8m + r names the row r of matrix m, 16 bytes of shared memory. Lane
// 4g + t receives elements 2t, 2t + 1 of row g of each.
__device__ __forceinline__ void LoadMatrices(uint32_t row_address, uint32_t& m0, uint32_t& m1, uint32_t& m2,
                                             uint32_t& m3) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m0), "=r"(m1), "=r"(m2), "=r"(m3)
               : "r"(row_address)
               : "memory");
}

// Stores four 8x8 matrices, the other way round: lane 4g + t holds elements 2t, 2t + 1 of row g of each.
__device__ __forceinline__ void StoreMatrices(uint32_t row_address, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements, a row of which lies in four consecutive lanes.
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// 2^x, at most 2 ulp; subnormal results and inputs become zero.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as f16, `low` in the low half, rounded to nearest even; magnitudes past the range become the largest
// finite value.
__device__ __forceinline__ uint32_t PackF16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

}  // namespace nibble::cuda
