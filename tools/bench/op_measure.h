// Time of an operator on whichever backend runs it.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "tools/bench/op_case.h"
#include "tools/bench/op_report.h"

namespace nibble {

class OpMeasure {
 public:
  virtual ~OpMeasure() = default;

  // Beyond what caches hold.
  virtual int64_t rotate_bytes() const = 0;
  // Fills in what is known about the machine.
  virtual void Describe(OpRun* run) = 0;
  // Time, clock and limit of a case.
  virtual void Time(OpCase& op, int replays, OpResult* result) = 0;
  // Times of cuBLASLt for a linear's shape, where there is one.
  virtual void TimeBaselines(const OpCase& op, int replays, OpResult* result) = 0;
};

// For the backend that `options` made `ops` with.
absl::StatusOr<std::unique_ptr<OpMeasure>> CreateOpMeasure(const OpsOptions& options, Ops& ops);

}  // namespace nibble
