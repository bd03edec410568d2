// Decode attention; docs/kernels-attention.md shows the pipeline.
//
// A block of six warps owns a share of the line of heads (segments.h) and draws more. Each of four warps computes one
// stream of every chunk; one walks the line in front of them; one folds chunks behind them. What they hand on lies in
// rings in shared memory, and nothing ever stops the whole block.
#include "kernels/cuda/attention/decode_fold.cuh"
#include "kernels/cuda/attention/decode_stream.cuh"
#include "kernels/cuda/attention/decode_walk.cuh"

namespace nibble::cuda {
namespace {

template <int kWords>
__global__ void __launch_bounds__(kDecodeThreads, kBlocksPerMultiprocessor)
    DecodeKernel(const __grid_constant__ DecodeParameters p) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  DecodeShared<kWords>& shared = *reinterpret_cast<DecodeShared<kWords>*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  GridDependencyLaunch();
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : shared.page_full) MbarrierInit(SharedAddress(&barrier), 1);
    for (uint64_t& barrier : shared.work_full) MbarrierInit(SharedAddress(&barrier), 32);
    for (uint64_t& barrier : shared.work_empty) MbarrierInit(SharedAddress(&barrier), 32);
    for (uint64_t& barrier : shared.query_full) MbarrierInit(SharedAddress(&barrier), 32);
    for (uint64_t& barrier : shared.merge_full) MbarrierInit(SharedAddress(&barrier), kStreams * 32);
    MbarrierInit(SharedAddress(&shared.partials_full), 1);
    MbarrierInitFence();
    shared.divided_count = 0;
  }
  Walk walk = {p, p.kv_heads * p.tiles, 0, 0};
  const HeadLine line = Survey<kWords>(p, &walk, &shared);
  if (static_cast<int>(blockIdx.x) >= line.blocks) {
    GridDependencyWait();  // a grid must not finish before the grids in front of it
    return;
  }
  if (warp == kWalkWarp) {
    Walker<kWords>(walk, line, shared).Run();
  } else if (warp == kFoldWarp) {
    Folder<kWords>(p, line, shared).Run();
  } else {
    RunStream<kWords>(shared);
  }
  __syncthreads();
  if (warp < kStreams) {
    int copies = 0;
    for (int i = 0; i < shared.divided_count; ++i) Combine<kWords>(p, line, shared.divided[i], shared, &copies);
  }
}

template <int kWords>
void LaunchDecode(const Device& device, const AttentionArgs& args, DecodeRows rows, uint32_t* counters) {
  const int64_t group = args.q_heads / args.pages.layout.kv_heads;
  const int64_t scratch = DecodeScratchBytes(device.multiprocessors, 32 * kWords, args.step.max_pages);
  const DecodeParameters parameters = {
      .step = ViewOf(args.step, args.pages),
      .pages = args.pages.data,
      .q = static_cast<const __nv_bfloat16*>(args.qkv.data),
      .out = static_cast<__nv_bfloat16*>(args.out.data),
      .q_stride = args.qkv.cols,
      .out_stride = args.out.cols,
      .kv_heads = static_cast<int>(args.pages.layout.kv_heads),
      .group = static_cast<int>(group),
      .tiles = static_cast<int>((group + kTileHeads - 1) / kTileHeads),
      .rows = rows,
      .scale_log2e = args.scale * 1.4426950408889634f,
      .partials = device.Scratch<float4>(scratch),
      .counters = counters,
  };
  constexpr int kSharedBytes = sizeof(DecodeShared<kWords>);
  AllowSharedMemory(DecodeKernel<kWords>, kSharedBytes);
  Launch(device, DecodeKernel<kWords>, dim3(device.multiprocessors * kBlocksPerMultiprocessor), dim3(kDecodeThreads),
         kSharedBytes, parameters);
}

}  // namespace

int64_t DecodeScratchBytes(int multiprocessors, int64_t head_dim, int64_t max_pages) {
  const int64_t partial_bytes = (head_dim * kTileHeads + 4 * kTileHeads) * static_cast<int64_t>(sizeof(float));
  const int64_t blocks = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  return blocks * MaxPartials(static_cast<int>(max_pages)) * partial_bytes;
}

int64_t DecodeCounterBytes(int multiprocessors) {
  return (int64_t{multiprocessors} * kBlocksPerMultiprocessor + 1) * static_cast<int64_t>(sizeof(uint32_t));
}

void DecodeAttention(const Device& device, const AttentionArgs& args, DecodeRows rows, uint32_t* counters) {
  if (args.pages.layout.head_dim == 128) {
    LaunchDecode<4>(device, args, rows, counters);
  } else {
    LaunchDecode<2>(device, args, rows, counters);
  }
}

}  // namespace nibble::cuda
