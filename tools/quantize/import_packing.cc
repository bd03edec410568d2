#include "tools/quantize/import_packing.h"

#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "common/base/float16.h"
#include "common/base/status.h"
#include "kernels/ops.h"

namespace nibble {
namespace {

constexpr int64_t kPerWord = 8;
constexpr int kAwqPlace[kPerWord] = {0, 4, 1, 5, 2, 6, 3, 7};  // in the word, of each of eight outputs

// Mapped tensors may be unaligned.
template <typename T>
T At(const TensorView& view, int64_t i) {
  T value;
  std::memcpy(&value, view.data + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}
uint8_t Nibble(const TensorView& view, int64_t word, int64_t place) {
  return static_cast<uint8_t>(At<uint32_t>(view, word) >> (4 * place) & 15);
}

absl::Status CheckGroups(const SafeTensors& tensors, const LinearShape& shape) {
  const std::string name = shape.name + ".g_idx";
  if (!tensors.Has(name)) return absl::OkStatus();
  const int64_t dims[] = {shape.k};
  NIBBLE_ASSIGN_OR_RETURN(const TensorView view, tensors.Get(name, TensorType::kI32, dims));
  for (int64_t k = 0; k < shape.k; ++k) {
    if (At<int32_t>(view, k) == k / kBlock) continue;
    return absl::UnimplementedError(
        absl::StrCat(name, ": channel ", k, " is in group ", At<int32_t>(view, k), ", must be in ", k / kBlock,
                     " (groups that follow the activation order, desc_act, cannot be imported)"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ForeignLinear> UnpackLinear(const SafeTensors& tensors, const LinearShape& shape, PackedFormat format) {
  const int64_t n = shape.n, k = shape.k, groups = k / kBlock;
  const bool awq = format == PackedFormat::kAwq;
  if (k % kBlock != 0 || n % kPerWord != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(shape.name, " is [", n, ", ", k, "], must be multiples of [", kPerWord, ", ", kBlock, "]"));
  }
  const int64_t weight_dims[] = {awq ? k : k / kPerWord, awq ? n / kPerWord : n};
  const int64_t zero_dims[] = {groups, n / kPerWord}, scale_dims[] = {groups, n};
  NIBBLE_ASSIGN_OR_RETURN(const TensorView qweight,
                          tensors.Get(shape.name + ".qweight", TensorType::kI32, weight_dims));
  NIBBLE_ASSIGN_OR_RETURN(const TensorView qzeros, tensors.Get(shape.name + ".qzeros", TensorType::kI32, zero_dims));
  NIBBLE_ASSIGN_OR_RETURN(const TensorView scales, tensors.Get(shape.name + ".scales", TensorType::kF16, scale_dims));
  if (!awq) NIBBLE_RETURN_IF_ERROR(CheckGroups(tensors, shape));

  ForeignLinear out{.n = n, .k = k, .codes = {}, .zeros = {}, .scales = {}};
  out.codes.resize(static_cast<size_t>(n * k));
  out.zeros.resize(static_cast<size_t>(n * groups));
  out.scales.resize(static_cast<size_t>(n * groups));
  for (int64_t row = 0; row < n; ++row) {
    const int64_t place = awq ? kAwqPlace[row % kPerWord] : row % kPerWord;
    for (int64_t c = 0; c < k; ++c) {
      out.codes[static_cast<size_t>(row * k + c)] = awq ? Nibble(qweight, (c * n + row) / kPerWord, place)
                                                        : Nibble(qweight, c / kPerWord * n + row, c % kPerWord);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const size_t to = static_cast<size_t>(row * groups + g);
      const uint8_t stored = Nibble(qzeros, (g * n + row) / kPerWord, place);
      out.zeros[to] = static_cast<uint8_t>(stored + (format == PackedFormat::kGptq ? 1 : 0));
      out.scales[to] = ToFloat(At<F16>(scales, g * n + row));
      if (!std::isfinite(out.scales[to]) || out.scales[to] < 0) {
        return absl::InvalidArgumentError(absl::StrCat(shape.name, ".scales: group ", g, " of output ", row, " is ",
                                                       out.scales[to], ", must be finite and not negative"));
      }
    }
  }
  return out;
}

}  // namespace nibble
