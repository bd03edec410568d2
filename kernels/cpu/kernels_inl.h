// Everything that is compiled once per instruction set, in one table. A kernels_<isa>.cc defines NIBBLE_ISA (a
// namespace of its own, so nothing compiled for a newer machine can be linked into code for an older one), opens its
// target pragma after the standard headers, defines Vec and IVec, the register blocking (kW4Rows, kAttentionSums, ...)
// and W4GroupDots, and includes this. The shape of the idea is Highway's foreach_target.h.
#pragma once

#include "kernels/cpu/attention_inl.h"
#include "kernels/cpu/linear_inl.h"
#include "kernels/cpu/math_inl.h"
#include "kernels/cpu/rows_inl.h"
#include "kernels/cpu/sampling_inl.h"

namespace nibble::NIBBLE_ISA {

template <Vec (*kFunction)(Vec)>
void Map(const float* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) kFunction(Vec::Load(in + i)).Store(out + i);
}

extern const KernelTable kKernels;
const KernelTable kKernels = {
    .isa = kIsa,
    .name = kIsaName,
    .add_norm = AddNorm,
    .add_delta = AddDelta,
    .quantize = QuantizeRow,
    .silu_mul = SiluMul,
    .widen = Widen,
    .group_sums = GroupSums,
    .w4_linear = W4Linear,
    .dense_linear = DenseLinear,
    .rope_append = RopeAppend,
    .attention = Attention,
    .sample = Sample,
    .exp = Map<Exp>,
    .log = Map<Log>,
    .neg_log_one_minus = Map<NegLogOneMinus>,
    .sigmoid = Map<Sigmoid>,
};

}  // namespace nibble::NIBBLE_ISA
