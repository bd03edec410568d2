// One 4-bit scale per token, as in QuaRot and SpinQuant: a coding that checkpoints cannot ask for, because a shared
// exponent is always chosen per block. For comparisons of what blocks are worth, on the CPU backend only.
#pragma once

#include <memory>
#include <vector>

#include "tools/eval/forwarding_ops.h"

namespace nibble {

// Every quantized input becomes a4 ∈ [-7, 7] with scale amax / 7 of its token, whatever block_bits say; permutations
// and Hadamards stay. The backend codes the token in 8 bits first and this rounds those codes once more, which adds at
// most 1/18 of a step of the 4-bit grid.
class PerTokenFourBitOps : public ForwardingOps {
 public:
  using ForwardingOps::ForwardingOps;

 protected:
  void DoAddNormQuantize(const AddNormQuantizeArgs& args) override;
  void DoQuantize(const QuantizeArgs& args) override;
  void DoSiluMulQuantize(const SiluMulQuantizeArgs& args) override;

 private:
  // `coding` with every block in 8 bits; valid until the next call.
  const InputCoding* EightBits(const InputCoding& coding);

  InputCoding coding_;
  std::vector<uint8_t> block_bits_;
};

}  // namespace nibble
