// The Llama forward pass on one rank: a list of operators and two collectives per layer.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "worker/comm/communicator.h"
#include "worker/model/kv_pool.h"
#include "worker/model/weights.h"

namespace nibble {

class Llama {
 public:
  struct Limits {
    int64_t rows = 0;        // T of one Forward
    int64_t logit_rows = 0;  // of one Logits
  };
  // Allocates the activations of the largest step. model, communicator and pool outlive the Llama.
  static absl::StatusOr<std::unique_ptr<Llama>> Create(const Model& model, Communicator& communicator,
                                                       const KvPool& pool, const Limits& limits);

  struct Input {
    StepRows step;
    const int32_t* token_ids = nullptr;    // [T] on the device; ~slot means the slot's newest token
    const int32_t* slot_tokens = nullptr;  // [slots] on the device
  };
  // Runs all layers and appends the step's keys and values to the pages. Errors are the communicator's.
  absl::Status Forward(const Input& input);

  // Logits of some rows of the last Forward; row_index [count] is on the device. Result: f32 [count, V] on the device,
  // the same bits on every rank, valid until the next call.
  absl::StatusOr<const float*> Logits(const int32_t* row_index, int64_t count);

  // Time inside collectives since the last call.
  std::chrono::nanoseconds TakeCollectiveTime() { return std::exchange(collective_time_, {}); }

 private:
  Llama(const Model& model, Communicator& communicator, const KvPool& pool, const Limits& limits);
  absl::Status Allocate();

  Rows Activations(const Buffer& buffer, int64_t rows, int64_t cols) const;
  LinearInput* Coded(const CodedInput& input, int64_t rows);
  void Linear(const LinearInput* input, const FusedLinear& linear, const Rows& out);
  absl::Status AllReduce(const Rows& rows);

  const Model& model_;
  Ops& ops_;
  Communicator& communicator_;
  const KvPool& pool_;
  const Limits limits_;

  Buffer residual_;   // [T, H]
  Buffer delta_;      // [T, H]: output of o_proj or down_proj, not yet added to the residual
  Buffer qkv_;        // [T, (Hq + 2 Hkv) D]
  Buffer attention_;  // [T, Hq D]
  Buffer gate_up_;    // [T, 2F]
  Buffer dense_, codes_, scales_, code_sums_, exponents_;  // the coded input of one linear; each is used up at once
  Buffer shard_logits_;                                    // f32 [logit rows, head columns], when the vocabulary is cut
  Buffer logits_;                                          // f32 [logit rows, V]
  LinearInput coded_;
  int64_t rows_ = 0;            // of the last Forward
  bool delta_pending_ = false;  // the last Forward's delta is not yet in the residual
  std::chrono::nanoseconds collective_time_{};
};

}  // namespace nibble
