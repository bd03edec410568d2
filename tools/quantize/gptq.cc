#include "tools/quantize/gptq.h"

#include <cstddef>

#include "common/base/check.h"
#include "kernels/ops.h"

namespace nibble {

LinearTensors EmptyTensors(const LinearShape& shape, const InputPlan& plan) {
  const int64_t n = shape.n, k = shape.k;
  NIBBLE_CHECK(k % kBlock == 0);
  NIBBLE_CHECK_EQ(static_cast<int64_t>(plan.block_bits.size()), k / kBlock);
  LinearTensors out;
  out.name = shape.name;
  out.n = n;
  out.k = k;
  out.quantized = true;
  out.block_bits = plan.block_bits;
  out.input_perm = plan.perm;
  out.qweight.resize(static_cast<size_t>(n * k / 2));
  out.group_scale.resize(static_cast<size_t>(n * k / kBlock));
  out.group_min.resize(static_cast<size_t>(n * k / kBlock));
  out.channel_scale.resize(static_cast<size_t>(n));
  return out;
}

std::vector<float> DequantizeLinear(const LinearTensors& tensors) {
  const size_t n = static_cast<size_t>(tensors.n), k = static_cast<size_t>(tensors.k);
  std::vector<float> weight(n * k);
  for (size_t row = 0; row < n; ++row) {
    for (size_t i = 0; i < k; ++i) {
      const uint8_t byte = tensors.qweight[(row * k + i) / 2];
      const int code = i % 2 == 0 ? byte & 15 : byte >> 4;
      const size_t group = row * (k / static_cast<size_t>(kBlock)) + i / static_cast<size_t>(kBlock);
      const size_t channel = tensors.input_perm.empty() ? i : static_cast<size_t>(tensors.input_perm[i]);
      weight[row * k + channel] =
          tensors.channel_scale[row] * static_cast<float>(code * tensors.group_scale[group] + tensors.group_min[group]);
    }
  }
  return weight;
}

double OutputError(std::span<const float> weight, const LinearTensors& tensors, std::span<const float> hessian) {
  const size_t n = static_cast<size_t>(tensors.n), k = static_cast<size_t>(tensors.k);
  NIBBLE_CHECK_EQ(weight.size(), n * k);
  NIBBLE_CHECK_EQ(hessian.size(), k * k);
  const std::vector<float> coded = DequantizeLinear(tensors);
  double error = 0;
  std::vector<double> d(k);
  for (size_t row = 0; row < n; ++row) {
    for (size_t i = 0; i < k; ++i) {
      d[i] = static_cast<double>(weight[row * k + i]) - static_cast<double>(coded[row * k + i]);
    }
    for (size_t i = 0; i < k; ++i) {
      double sum = 0;
      for (size_t j = 0; j < k; ++j) sum += static_cast<double>(hessian[i * k + j]) * d[j];
      error += d[i] * sum;
    }
  }
  return error;
}

}  // namespace nibble
