// Ops that let somebody watch: every call goes to a real backend, then the observer sees arguments and results. How the
// quantizer learns what each linear reads, from the very forward pass that serves. Host memory only (CPU backend).
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "kernels/ops.h"

namespace nibble {

// Called in the thread that runs the forward pass, after the operator.
class OpsObserver {
 public:
  virtual ~OpsObserver() = default;
  virtual void AfterLinear(const LinearArgs& args) = 0;
  virtual void AfterAddNormQuantize(const AddNormQuantizeArgs& args) = 0;
  virtual void AfterRopeAppend(const RopeAppendArgs& args) = 0;  // rotated keys are in the pages
};

class ObservingOps : public Ops {
 public:
  // observer outlives this and may be null (nothing is watched); SetObserver may change it between steps.
  ObservingOps(std::unique_ptr<Ops> backend, OpsObserver* observer)
      : backend_(std::move(backend)), observer_(observer) {}
  void SetObserver(OpsObserver* observer) { observer_ = observer; }

  std::string Describe() const override { return backend_->Describe(); }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return backend_->Allocate(bytes); }
  void Upload(void* to, const void* from, size_t bytes) override { backend_->Upload(to, from, bytes); }
  void Download(void* to, const void* from, size_t bytes) override { backend_->Download(to, from, bytes); }
  absl::Status Synchronize() override { return backend_->Synchronize(); }

 protected:
  absl::StatusOr<std::unique_ptr<Weight>> DoPackW4(std::span<const W4View> parts) override {
    return backend_->PackW4(parts);
  }
  absl::StatusOr<std::unique_ptr<Weight>> DoPackDense(std::span<const DenseView> parts) override {
    return backend_->PackDense(parts);
  }
  void DoBeginStep(const BeginStepArgs& args) override { backend_->BeginStep(args); }
  void DoEmbed(const EmbedArgs& args) override { backend_->Embed(args); }
  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override {
    backend_->AddNormQuantize(args);
    if (observer_ != nullptr) observer_->AfterAddNormQuantize(args);
  }
  void DoQuantize(const QuantizeArgs& args) override { backend_->Quantize(args); }
  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override { backend_->SiluMulQuantize(args); }
  void DoLinear(const LinearArgs& args) override {
    backend_->Linear(args);
    if (observer_ != nullptr) observer_->AfterLinear(args);
  }
  void DoRopeAppend(const RopeAppendArgs& args) override {
    backend_->RopeAppend(args);
    if (observer_ != nullptr) observer_->AfterRopeAppend(args);
  }
  void DoAttention(const AttentionArgs& args) override { backend_->Attention(args); }
  void DoRecordHistory(const RecordHistoryArgs& args) override { backend_->RecordHistory(args); }
  void DoSample(const SampleArgs& args) override { backend_->Sample(args); }

 private:
  const std::unique_ptr<Ops> backend_;
  OpsObserver* observer_;
};

}  // namespace nibble
