#include "kernels/cuda/ptx/launch.h"
#include "kernels/cuda/rows/launch.cuh"
#include "kernels/cuda/rows/rows.h"

namespace nibble::cuda {
namespace {

// One block per row.
__global__ void EmbedRows(const int32_t* token_ids, const int32_t* slot_tokens, const uint16_t* table, int64_t vocab,
                          const Rows out, const bool whole) {
  GridDependencyLaunch();
  GridDependencyWait();
  int64_t id = token_ids[blockIdx.x];
  if (id < 0) id = slot_tokens[~id];
  if (id < 0 || id >= vocab) __trap();
  const int h = static_cast<int>(out.cols);
  if (whole && out.dtype == DType::kBF16) {
    constexpr int kTogether = 4;  // loads of a thread before its first store
    const int octets = h / kOctet, threads = static_cast<int>(blockDim.x);
    const uint4* const from = reinterpret_cast<const uint4*>(table + id * h);
    uint4* const to = static_cast<uint4*>(RowPointer(out, blockIdx.x));
    for (int first = static_cast<int>(threadIdx.x); first < octets; first += kTogether * threads) {
      uint4 x[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i * threads < octets) x[i] = from[first + i * threads];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i * threads < octets) to[first + i * threads] = x[i];
      }
    }
    return;
  }
  const RowSpan from = {const_cast<uint16_t*>(table + id * h), DType::kBF16, whole};
  const RowSpan to = RowAt(out, blockIdx.x, 0, whole);
  for (int begin = static_cast<int>(threadIdx.x) * kOctet; begin < h; begin += static_cast<int>(blockDim.x) * kOctet) {
    float x[kOctet];
    LoadOctet(from, begin, h, x);
    StoreOctet(to, begin, h, x);
  }
}

}  // namespace

void Embed(const Device& device, const EmbedArgs& args) {
  const bool whole = WholeOctets(args.out, args.out.cols) && reinterpret_cast<uintptr_t>(args.table) % 16 == 0;
  Launch(device, EmbedRows, dim3(static_cast<unsigned>(args.out.rows)), dim3(256), 0, args.token_ids, args.slot_tokens,
         reinterpret_cast<const uint16_t*>(args.table), args.vocab, args.out, whole);
}

}  // namespace nibble::cuda
