#include "worker/comm/gloo_communicator.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "worker/comm/gloo_mesh.h"
#include "worker/comm/rank_sum.h"

namespace nibble {
namespace {

// Up to here every rank sends its whole vector to everybody: one hop. Above, and with more than two ranks, the bytes on
// the wire matter more than the second hop.
constexpr size_t kDirectBytes = 64 * 1024;

class GlooCommunicator : public Communicator {
 public:
  explicit GlooCommunicator(std::unique_ptr<GlooMesh> mesh)
      : mesh_(std::move(mesh)), send_(mesh_->size()), expected_bytes_(mesh_->size()), parts_(mesh_->size()) {}

  int rank() const override { return mesh_->rank(); }
  int size() const override { return mesh_->size(); }
  void Abort(std::string_view reason) override { mesh_->Abort(reason); }

  absl::Status AllReduceSum(const Rows& rows) override {
    const int64_t count = rows.rows * rows.cols;
    if (count == 0) return absl::OkStatus();
    uint8_t* data = static_cast<uint8_t*>(rows.data);
    if (size() == 2 || static_cast<size_t>(count * SizeOf(rows.dtype)) <= kDirectBytes) {
      return ReduceDirect(data, count, rows.dtype);
    }
    return ReduceInSlices(data, count, rows.dtype);
  }

  absl::Status AllGather(const void* in, int64_t rows, size_t row_bytes, void* out) override {
    NIBBLE_CHECK(row_bytes > 0);
    // Whole rows per round while they fit, else pieces of one row.
    const size_t piece_bytes = std::min(row_bytes, GlooMesh::kChunkBytes);
    const int64_t rows_per_round = std::max<int64_t>(1, static_cast<int64_t>(GlooMesh::kChunkBytes / row_bytes));
    const size_t out_row_bytes = row_bytes * size();
    for (int64_t row = 0; row < rows; row += rows_per_round) {
      const int64_t count = std::min(rows_per_round, rows - row);
      for (size_t offset = 0; offset < row_bytes; offset += piece_bytes) {
        const size_t bytes = std::min(piece_bytes, row_bytes - offset);  // row_bytes unless count is 1
        const uint8_t* mine = static_cast<const uint8_t*>(in) + row * row_bytes + offset;
        NIBBLE_RETURN_IF_ERROR(RoundOfEqual(mine, count * bytes));
        for (int r = 0; r < size(); ++r) {
          const uint8_t* from = r == rank() ? mine : mesh_->received(r);
          uint8_t* to = static_cast<uint8_t*>(out) + row * out_row_bytes + r * row_bytes + offset;
          for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * out_row_bytes, from + i * bytes, bytes);
        }
      }
    }
    return absl::OkStatus();
  }

 private:
  // Everybody sends everybody the same bytes.
  absl::Status RoundOfEqual(const uint8_t* mine, size_t bytes) {
    std::fill(send_.begin(), send_.end(), GlooMesh::Message{mine, bytes});
    std::fill(expected_bytes_.begin(), expected_bytes_.end(), bytes);
    return mesh_->Round(send_, expected_bytes_);
  }

  // parts_ = what the ranks hold of [mine, ...), in rank order.
  std::span<const void* const> PartsWith(const uint8_t* mine) {
    for (int r = 0; r < size(); ++r) parts_[r] = r == rank() ? mine : mesh_->received(r);
    return parts_;
  }

  absl::Status ReduceDirect(uint8_t* data, int64_t count, DType dtype) {
    const int64_t per_round = GlooMesh::kChunkBytes / SizeOf(dtype);
    for (int64_t begin = 0; begin < count; begin += per_round) {
      const int64_t n = std::min(per_round, count - begin);
      uint8_t* mine = data + begin * SizeOf(dtype);
      NIBBLE_RETURN_IF_ERROR(RoundOfEqual(mine, n * SizeOf(dtype)));
      SumInRankOrder(PartsWith(mine), dtype, n, mine);
    }
    return absl::OkStatus();
  }

  // Reduce-scatter, then all-gather: rank r sums slice r of everybody, in rank order, and hands out the rounded sum.
  // The same additions as ReduceDirect, so the same bits.
  absl::Status ReduceInSlices(uint8_t* data, int64_t count, DType dtype) {
    const int64_t element = SizeOf(dtype);
    const int64_t slice = (count + size() - 1) / size();
    const int64_t per_round = std::min<int64_t>(slice, GlooMesh::kChunkBytes / element);
    for (int64_t begin = 0; begin < slice; begin += per_round) {
      // Elements [first(r), first(r) + length(r)): this round's part of slice r, possibly short or empty at the end.
      const auto first = [&](int r) { return std::min(r * slice + begin, count); };
      const auto length = [&](int r) {
        return std::min({r * slice + begin + per_round, (r + 1) * slice, count}) - first(r);
      };
      const auto bytes = [&](int r) { return static_cast<size_t>(std::max<int64_t>(0, length(r)) * element); };
      uint8_t* mine = data + first(rank()) * element;
      for (int r = 0; r < size(); ++r) {
        send_[r] = {data + first(r) * element, bytes(r)};
        expected_bytes_[r] = bytes(rank());
      }
      NIBBLE_RETURN_IF_ERROR(mesh_->Round(send_, expected_bytes_));
      SumInRankOrder(PartsWith(mine), dtype, static_cast<int64_t>(bytes(rank())) / element, mine);
      for (int r = 0; r < size(); ++r) {
        send_[r] = {mine, bytes(rank())};
        expected_bytes_[r] = bytes(r);
      }
      NIBBLE_RETURN_IF_ERROR(mesh_->Round(send_, expected_bytes_));
      for (int r = 0; r < size(); ++r) {
        if (r != rank() && bytes(r) > 0) std::memcpy(data + first(r) * element, mesh_->received(r), bytes(r));
      }
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<GlooMesh> mesh_;
  std::vector<GlooMesh::Message> send_;
  std::vector<size_t> expected_bytes_;
  std::vector<const void*> parts_;
};

class PendingGlooCommunicator : public PendingCommunicator {
 public:
  explicit PendingGlooCommunicator(std::unique_ptr<GlooMesh> mesh)
      : mesh_(std::move(mesh)), endpoint_(mesh_->endpoint()) {}

  std::string endpoint() const override { return endpoint_; }

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(std::span<const std::string> endpoints) override {
    NIBBLE_CHECK(mesh_ != nullptr, "Connect was called before");
    std::unique_ptr<GlooMesh> mesh = std::move(mesh_);
    NIBBLE_RETURN_IF_ERROR(mesh->Connect(endpoints));
    return std::make_unique<GlooCommunicator>(std::move(mesh));
  }

 private:
  std::unique_ptr<GlooMesh> mesh_;
  const std::string endpoint_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PendingCommunicator>> PrepareGlooCommunicator(const CommunicatorOptions& options) {
  NIBBLE_ASSIGN_OR_RETURN(auto mesh, GlooMesh::Open(options.rank, options.size, options.host, options.timeout));
  return std::make_unique<PendingGlooCommunicator>(std::move(mesh));
}

}  // namespace nibble
