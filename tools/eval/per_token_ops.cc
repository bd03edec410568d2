#include "tools/eval/per_token_ops.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace nibble {
namespace {

constexpr int kFourBitMax = 7;

void RoundToFourBits(LinearInput* coded) {
  if (coded->codes == nullptr) return;
  for (int64_t t = 0; t < coded->rows; ++t) {
    int8_t* codes = coded->codes + t * coded->k;
    int largest = 0;
    for (int64_t i = 0; i < coded->k; ++i) largest = std::max(largest, std::abs(int{codes[i]}));
    if (largest == 0) continue;
    const float step = static_cast<float>(largest) / kFourBitMax;
    int32_t sum = 0;
    for (int64_t i = 0; i < coded->k; ++i) {
      codes[i] = static_cast<int8_t>(std::nearbyint(static_cast<float>(codes[i]) / step));
      sum += codes[i];
    }
    coded->scales[t] *= step;
    coded->code_sums[t] = sum;
  }
}

}  // namespace

const InputCoding* PerTokenFourBitOps::EightBits(const InputCoding& coding) {
  coding_ = coding;
  if (coding.quantized) {
    block_bits_.assign(static_cast<size_t>(coding.k / kBlock), 8);
    coding_.block_bits = block_bits_.data();
  }
  return &coding_;
}

void PerTokenFourBitOps::DoAddNormQuantize(const AddNormQuantizeArgs& args) {
  AddNormQuantizeArgs wide = args;
  wide.coding = EightBits(*args.coding);
  backend().AddNormQuantize(wide);
  RoundToFourBits(args.out);
}

void PerTokenFourBitOps::DoQuantize(const QuantizeArgs& args) {
  QuantizeArgs wide = args;
  wide.coding = EightBits(*args.coding);
  backend().Quantize(wide);
  RoundToFourBits(args.out);
}

void PerTokenFourBitOps::DoSiluMulQuantize(const SiluMulQuantizeArgs& args) {
  SiluMulQuantizeArgs wide = args;
  wide.coding = EightBits(*args.coding);
  backend().SiluMulQuantize(wide);
  RoundToFourBits(args.out);
}

}  // namespace nibble
