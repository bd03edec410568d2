#include "kernels/cuda/attention/attention.h"

#include <algorithm>

#include "kernels/cuda/attention/plain.h"
#ifdef NIBBLE_CUDA_ATTENTION_SM90
#include "kernels/cuda/attention/decode.h"
#include "kernels/cuda/attention/prefill.h"
#endif

namespace nibble::cuda {

#ifdef NIBBLE_CUDA_ATTENTION_SM90
namespace {

bool IsFastHead(const KvLayout& layout) {
  return layout.format == KvFormat::kKV4 && (layout.head_dim == 64 || layout.head_dim == 128);
}

// Whether the tensor-core kernels take these rows.
bool IsFast(const Device& device, const AttentionArgs& args) {
  return device.capability == 90 && IsFastHead(args.pages.layout) && args.qkv.dtype == DType::kBF16 &&
         args.out.dtype == DType::kBF16 && args.q_heads / args.pages.layout.kv_heads <= kMaxPrefillGroup;
}

// A tile of the prefill kernel walks its whole context in one block, while decode shares contexts out over all of them.
// So many contexts per multiprocessor take it less time than the longest of them takes a tile.
constexpr int64_t kDecodeContexts = 2;

bool DecodeIsFaster(const Device& device, const AttentionArgs& args) {
  return args.step.rows * args.pages.layout.kv_heads <= kDecodeContexts * device.multiprocessors;
}

}  // namespace

// What both kernels use depends on the grid, which is the same for any number of rows.
int64_t AttentionScratchBytes(const Device& device, const KvLayout& layout, int64_t /*q_heads*/, int64_t /*max_rows*/,
                              int64_t max_pages) {
  if (!IsFastHead(layout)) return 0;
  return std::max(DecodeScratchBytes(device.multiprocessors, layout.head_dim, max_pages),
                  PrefillScratchBytes(device.multiprocessors, layout.head_dim));
}

int64_t AttentionCounterBytes(const Device& device) { return DecodeCounterBytes(device.multiprocessors); }

void Attention(const Device& device, const AttentionArgs& args, uint32_t* counters) {
  if (!IsFast(device, args)) {
    PlainAttention(device, args);
    return;
  }
  // As many rows as sequences: almost surely one each. The decode kernel is right for any.
  if (args.step.rows <= args.step.sequences || DecodeIsFaster(device, args)) {
    DecodeAttention(device, args, DecodeRows::kAll, counters);
    return;
  }
  PrefillAttention(device, args);
  if (args.step.sequences > 1) DecodeAttention(device, args, DecodeRows::kSingle, counters);
}
#else
int64_t AttentionScratchBytes(const Device&, const KvLayout&, int64_t, int64_t, int64_t) { return 0; }
int64_t AttentionCounterBytes(const Device&) { return 0; }
void Attention(const Device& device, const AttentionArgs& args, uint32_t*) { PlainAttention(device, args); }
#endif

}  // namespace nibble::cuda
