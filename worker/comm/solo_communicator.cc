#include "worker/comm/solo_communicator.h"

#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nibble {
namespace {

class SoloCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }

  absl::Status AllReduceSum(const Rows& rows) override { return status(); }

  absl::Status AllGather(const void* in, int64_t rows, size_t row_bytes, void* out) override {
    if (rows > 0 && in != out) std::memcpy(out, in, static_cast<size_t>(rows) * row_bytes);
    return status();
  }

  // Nothing ever blocks here, but an aborted group stays aborted at every size.
  void Abort(std::string_view reason) override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = absl::CancelledError(absl::StrCat("communicator aborted: ", std::string(reason)));
  }

 private:
  absl::Status status() {
    std::lock_guard<std::mutex> lock(mutex_);
    return status_;
  }

  std::mutex mutex_;
  absl::Status status_;
};

class PendingSoloCommunicator : public PendingCommunicator {
 public:
  std::string endpoint() const override { return "solo"; }

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::span<const std::string> endpoints) override {
    if (endpoints.size() != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("endpoints has ", endpoints.size(), " entries, the group has 1 rank"));
    }
    if (endpoints[0] != endpoint()) {
      return absl::InvalidArgumentError("endpoints[0] is not the endpoint this rank published");
    }
    return std::make_unique<SoloCommunicator>();
  }
};

}  // namespace

std::unique_ptr<PendingCommunicator> PrepareSoloCommunicator() { return std::make_unique<PendingSoloCommunicator>(); }

}  // namespace nibble
