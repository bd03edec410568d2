#include "kernels/cpu/kernel_table.h"

#include "common/base/check.h"

namespace nibble {

namespace portable {
extern const KernelTable kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512vnni {
extern const KernelTable kKernels;
}
#endif

namespace {

bool HasAvx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool HasAvx512Vnni() {
#if defined(__x86_64__)
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

void* Scratch::Reserve(size_t bytes) {
  if (buffer_.bytes() < bytes) {
    buffer_ = Buffer();  // free before asking for more
    absl::StatusOr<Buffer> grown = AllocateHost(bytes + bytes / 2);
    NIBBLE_CHECK(grown.ok(), grown.status().ToString());
    buffer_ = *std::move(grown);
  }
  return buffer_.data();
}

std::vector<Isa> AvailableIsas() {
  std::vector<Isa> isas = {Isa::kPortable};
  if (HasAvx2()) isas.push_back(Isa::kAvx2);
  if (HasAvx512Vnni()) isas.push_back(Isa::kAvx512Vnni);
  return isas;
}

const KernelTable& KernelsFor(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Vnni && HasAvx512Vnni()) return avx512vnni::kKernels;
  if (isa == Isa::kAvx2 && HasAvx2()) return avx2::kKernels;
#endif
  NIBBLE_CHECK(isa == Isa::kPortable, "instruction set " + std::to_string(static_cast<int>(isa)) + " is not available");
  return portable::kKernels;
}

}  // namespace nibble
