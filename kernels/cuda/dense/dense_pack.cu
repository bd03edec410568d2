#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/dense/dense.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kStagingBytes = int64_t{64} << 20;

absl::Status Lost(cudaError_t error) {
  return absl::InternalError(absl::StrCat("packing a dense weight: ", cudaGetErrorName(error), ", ",
                                          cudaGetErrorString(error)));
}

// rows: [count, K], outputs of `panels` panels in checkpoint order. A thread writes one lane's fragment.
__global__ void ReorderKernel(const uint16_t* rows, int64_t count, int64_t k, int64_t k_tiles, int64_t fragments,
                              uint4* panels) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= fragments) return;
  const int64_t lane = at % 32, tile = at / 32 % 4, k_tile = at / 128 % k_tiles, panel = at / 128 / k_tiles;
  uint32_t words[4];
  for (int word = 0; word < 4; ++word) {
    const int64_t n = panel * kDensePanelN + tile * 16 + lane / 4 + word % 2 * 8;
    const int64_t first = k_tile * 16 + lane % 4 * 2 + word / 2 * 8;
    words[word] = 0;
    for (int i = 0; i < 2; ++i) {
      if (n < count && first + i < k) words[word] |= static_cast<uint32_t>(rows[n * k + first + i]) << (16 * i);
    }
  }
  panels[at] = {words[0], words[1], words[2], words[3]};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Weight>> PackDense(const Device& device, Staging& staging,
                                                  std::span<const DenseView> parts) {
  auto weight = std::make_unique<DenseWeight>();
  for (const DenseView& part : parts) weight->n += part.n;
  const int64_t k = weight->k = parts[0].k, k_tiles = (k + 15) / 16;
  const int64_t panels = (weight->n + kDensePanelN - 1) / kDensePanelN, panel_bytes = k_tiles * 16 * kDensePanelN * 2;
  weight->bytes = panels * panel_bytes;
  auto data = AllocateDevice(device, weight->bytes, "a dense weight");
  if (!data.ok()) return data.status();
  weight->data = *std::move(data);
  const int64_t batch = std::clamp<int64_t>(kStagingBytes / panel_bytes, 1, panels) * kDensePanelN;  // outputs
  auto rows = AllocateDevice(device, batch * k * 2, "a dense weight");  // in checkpoint order
  if (!rows.ok()) return rows.status();

  int64_t part = 0, used = 0;  // outputs of the part that were taken
  for (int64_t begin = 0; begin < weight->n; begin += batch) {
    const int64_t count = std::min(batch, weight->n - begin);
    for (int64_t filled = 0; filled < count;) {
      const int64_t take = std::min(count - filled, parts[part].n - used);
      const cudaError_t error = staging.Upload(rows->as<uint16_t>() + filled * k, parts[part].data + used * k,
                                               static_cast<size_t>(take * k * 2));
      if (error != cudaSuccess) return Lost(error);
      filled += take;
      used += take;
      if (used == parts[part].n) {
        ++part;
        used = 0;
      }
    }
    constexpr int kThreads = 256;
    const int64_t fragments = (count + kDensePanelN - 1) / kDensePanelN * panel_bytes / 16;
    ReorderKernel<<<static_cast<unsigned>((fragments + kThreads - 1) / kThreads), kThreads, 0, device.stream>>>(
        rows->as<uint16_t>(), count, k, k_tiles, fragments,
        weight->data.as<uint4>() + begin / kDensePanelN * panel_bytes / 16);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return Lost(error);
  }
  if (const cudaError_t error = cudaStreamSynchronize(device.stream); error != cudaSuccess) return Lost(error);
  return weight;
}

}  // namespace nibble::cuda
