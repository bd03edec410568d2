// Ops that pass every call on to a real backend: a base for evaluations that look at, or change, some of them.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "kernels/ops.h"

namespace nibble {

class ForwardingOps : public Ops {
 public:
  explicit ForwardingOps(std::unique_ptr<Ops> backend) : backend_(std::move(backend)) {}

  std::string Describe() const override { return backend_->Describe(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return backend_->Allocate(bytes); }
  void Upload(void* to, const void* host_from, size_t bytes) override { backend_->Upload(to, host_from, bytes); }
  void Download(void* host_to, const void* from, size_t bytes) override { backend_->Download(host_to, from, bytes); }
  absl::Status Synchronize() override { return backend_->Synchronize(); }

 protected:
  Ops& backend() { return *backend_; }

  absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) override {
    return backend_->PackW4(parts);
  }
  absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) override {
    return backend_->PackDense(parts);
  }
  void DoBeginStep(const BeginStepArgs& args) override { backend_->BeginStep(args); }
  void DoEmbed(const EmbedArgs& args) override { backend_->Embed(args); }
  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override { backend_->AddNormQuantize(args); }
  void DoQuantize(const QuantizeArgs& args) override { backend_->Quantize(args); }
  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override { backend_->SiluMulQuantize(args); }
  void DoLinear(const LinearArgs& args) override { backend_->Linear(args); }
  void DoRopeAppend(const RopeAppendArgs& args) override { backend_->RopeAppend(args); }
  void DoAttention(const AttentionArgs& args) override { backend_->Attention(args); }
  void DoRecordHistory(const RecordHistoryArgs& args) override { backend_->RecordHistory(args); }
  void DoSample(const SampleArgs& args) override { backend_->Sample(args); }

 private:
  const std::unique_ptr<Ops> backend_;
};

}  // namespace nibble
