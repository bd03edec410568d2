// The CUDA backend behind kernels/ops.h: one device, one stream, memory, and which family of kernels serves which
// operator. docs/kernels.md, "The CUDA backend".
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/ops.h"

namespace nibble {

struct CudaOptions {
  int device = 0;  // ordinal
};

// UNAVAILABLE when the machine has no such device, its driver is too old, or this build has no kernels for it.
//
// Used by one thread at a time, any thread. Operators only launch kernels, with no allocation and no waiting, so they
// can be captured in a CUDA graph, but for this: scratch memory grows to what a plan asks for when a weight is packed
// or an operator first meets a larger step, never while the stream is captured (a bug then). A graph keeps the scratch
// memory it was captured with: outgrown memory lives as long as the backend.
//
// A kernel that traps (a token, page or row out of range) makes the device unusable for the process; Synchronize says
// so with INTERNAL, then and ever after.
absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(const CudaOptions& options);

namespace cuda {
struct Device;

// The device of `ops` and the stream it issues on, for capturing and timing its operators; null for another backend.
const Device* DeviceOf(const Ops& ops);
}  // namespace cuda

}  // namespace nibble
