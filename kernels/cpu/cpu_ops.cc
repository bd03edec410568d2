#include "kernels/cpu/cpu_ops.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/thread_pool.h"

namespace nibble {
namespace {

// Rows of a dense linear taken together: their f32 inputs stay in the second-level cache while all weights pass by.
constexpr int64_t kDensePanelRows = 192;
// (row, query head) pairs of one attention item: enough to pay for unpacking a page, few enough to stay in cache.
constexpr int64_t kAttentionItemHeads = 32;

class CpuOps final : public Ops {
 public:
  explicit CpuOps(const CpuOptions& options)
      : kernels_(KernelsFor(options.isa.value_or(AvailableIsas().back()))),
        pool_(options.threads),
        scratch_(options.threads) {}

  std::string Describe() const override {
    return absl::StrCat("cpu: ", pool_.threads(), pool_.threads() == 1 ? " thread, " : " threads, ", kernels_.name);
  }

  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return AllocateHost(bytes); }
  void Upload(void* to, const void* host_from, size_t bytes) override {
    if (bytes != 0) std::memcpy(to, host_from, bytes);
  }
  void Download(void* host_to, const void* from, size_t bytes) override {
    if (bytes != 0) std::memcpy(host_to, from, bytes);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

 protected:
  absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) override {
    return PackW4Tiles(parts);
  }
  absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) override {
    return PackDenseTiles(parts);
  }

  void DoBeginStep(const BeginStepArgs& args) override {
    const int64_t kv_heads = args.layout.kv_heads;
    const int64_t item_rows = std::max<int64_t>(1, kAttentionItemHeads / (args.q_heads / kv_heads));
    attention_items_.clear();
    for (int64_t s = 0; s < args.step.sequences; ++s) {
      const int64_t end = args.step.row_begin[s + 1];
      for (int64_t row = args.step.row_begin[s]; row < end; row += item_rows) {
        for (int64_t head = 0; head < kv_heads; ++head) {
          attention_items_.push_back({row, std::min(row + item_rows, end), head});
        }
      }
    }
  }

  void DoEmbed(const EmbedArgs& args) override {
    const int64_t h = args.out.cols;
    pool_.ParallelFor(args.out.rows, [&](int64_t row, int) {
      int64_t id = args.token_ids[row];
      if (id < 0) id = args.slot_tokens[~id];
      NIBBLE_CHECK(id >= 0 && id < args.vocab, absl::StrCat("token id ", id, " of vocabulary ", args.vocab));
      const BF16* from = args.table + id * h;
      if (args.out.dtype == DType::kBF16) {
        std::memcpy(static_cast<BF16*>(args.out.data) + row * h, from, h * sizeof(BF16));
      } else {
        kernels_.widen(from, h, static_cast<float*>(args.out.data) + row * h);
      }
    });
  }

  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override {
    const bool add = args.delta != nullptr;
    const bool gathered = args.row_index != nullptr;  // then every delta is added before any row is read
    if (add && gathered) {
      pool_.ParallelFor(args.residual.rows, [&](int64_t row, int) { kernels_.add_delta(args, row); });
    }
    pool_.ParallelFor(args.out->rows, [&](int64_t row, int thread) {
      if (add && !gathered) kernels_.add_delta(args, row);
      kernels_.add_norm(args, row, &scratch_[thread]);
    });
  }

  void DoQuantize(const QuantizeArgs& args) override {
    pool_.ParallelFor(args.in.rows, [&](int64_t row, int thread) { kernels_.quantize(args, row, &scratch_[thread]); });
  }

  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override {
    pool_.ParallelFor(args.gate_up.rows,
                      [&](int64_t row, int thread) { kernels_.silu_mul(args, row, &scratch_[thread]); });
  }

  void DoLinear(const LinearArgs& args) override {
    if (args.input.codes != nullptr) {
      W4Linear(args);
    } else {
      DenseLinear(args);
    }
  }

  void DoRopeAppend(const RopeAppendArgs& args) override {
    pool_.ParallelFor(args.step.rows,
                      [&](int64_t row, int thread) { kernels_.rope_append(args, row, &scratch_[thread]); });
  }

  void DoAttention(const AttentionArgs& args) override {
    pool_.ParallelFor(static_cast<int64_t>(attention_items_.size()), [&](int64_t i, int thread) {
      const AttentionItem& item = attention_items_[static_cast<size_t>(i)];
      kernels_.attention(args, item.row_begin, item.row_end, item.kv_head, &scratch_[thread]);
    });
  }

  void DoRecordHistory(const RecordHistoryArgs& args) override {
    std::memset(args.history, 0, args.vocab * sizeof(uint16_t));
    for (int64_t i = 0; i < args.count; ++i) {
      const int64_t id = args.token_ids[i];
      NIBBLE_CHECK(id >= 0 && id < args.vocab, absl::StrCat("token id ", id, " of vocabulary ", args.vocab));
      uint16_t& seen = args.history[id];
      if (i < args.num_prompt) {
        seen |= 0x8000;
      } else if ((seen & 0x7fff) != 0x7fff) {
        ++seen;
      }
    }
  }

  void DoSample(const SampleArgs& args) override {
    pool_.ParallelFor(args.rows, [&](int64_t row, int thread) { kernels_.sample(args, row, &scratch_[thread]); });
  }

 private:
  void W4Linear(const LinearArgs& args) {
    const auto* weight = dynamic_cast<const W4Weight*>(args.weight);
    NIBBLE_CHECK(weight != nullptr, "a quantized input needs a weight from PackW4");
    const int64_t rows = args.input.rows, groups = weight->groups;
    int32_t* sums = static_cast<int32_t*>(linear_scratch_.Reserve(rows * groups * sizeof(int32_t)));
    for (int64_t row = 0; row < rows; ++row) {
      kernels_.group_sums(args.input.codes + row * weight->k, groups, sums + row * groups);
    }
    const W4Problem problem = {.weight = weight,
                               .rows = rows,
                               .codes = args.input.codes,
                               .scales = args.input.scales,
                               .group_sums = sums,
                               .bias = args.bias,
                               .out = args.out};
    const int64_t step = TilesPerItem(weight->tiles);
    pool_.ParallelFor(CeilDiv(weight->tiles, step), [&](int64_t item, int) {
      kernels_.w4_linear(problem, 0, rows, item * step, std::min((item + 1) * step, weight->tiles));
    });
  }

  void DenseLinear(const LinearArgs& args) {
    const auto* weight = dynamic_cast<const DenseWeight*>(args.weight);
    NIBBLE_CHECK(weight != nullptr, "a dense input needs a weight from PackDense");
    const Rows& in = args.input.dense;
    const int64_t rows = args.input.rows, k = weight->k;
    const float* x = static_cast<const float*>(in.data);
    if (in.dtype == DType::kBF16) {
      float* wide = static_cast<float*>(linear_scratch_.Reserve(rows * k * sizeof(float)));
      kernels_.widen(static_cast<const BF16*>(in.data), rows * k, wide);
      x = wide;
    }
    const DenseProblem problem = {.weight = weight, .rows = rows, .in = x, .bias = args.bias, .out = args.out};
    const int64_t step = TilesPerItem(weight->tiles);
    const int64_t tile_items = CeilDiv(weight->tiles, step);
    pool_.ParallelFor(CeilDiv(rows, kDensePanelRows) * tile_items, [&](int64_t item, int) {
      const int64_t row = item / tile_items * kDensePanelRows, tile = item % tile_items * step;
      kernels_.dense_linear(problem, row, std::min(row + kDensePanelRows, rows), tile,
                            std::min(tile + step, weight->tiles));
    });
  }

  // Some items per thread, so that a thread that was interrupted does not hold up the others; all tiles when alone.
  int64_t TilesPerItem(int64_t tiles) const {
    if (pool_.threads() == 1) return tiles;
    return std::max<int64_t>(4, CeilDiv(CeilDiv(tiles, 4 * pool_.threads()), 4) * 4);
  }

  // Rows [row_begin, row_end) of one sequence, one KV head.
  struct AttentionItem {
    int64_t row_begin, row_end, kv_head;
  };

  const KernelTable& kernels_;
  ThreadPool pool_;
  std::vector<Scratch> scratch_;  // one per thread
  Scratch linear_scratch_;        // what a linear computes about its input before its tiles
  std::vector<AttentionItem> attention_items_;  // of the step begun last
};

}  // namespace

std::unique_ptr<Ops> CreateCpuOps(const CpuOptions& options) { return std::make_unique<CpuOps>(options); }

}  // namespace nibble
