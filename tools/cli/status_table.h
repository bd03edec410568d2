// GetStatus and GetModelInfo as a table for people and as JSON for scripts. Pure.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "nibble/v1/inference.pb.h"

namespace nibble {

int ReadyReplicas(const v1::GetStatusResponse& status);

// Several lines, each with a line end:
//   novelist-17m  w4a4kv4 · 4 layers · hidden 512 · context 4096        nibble 0.1.0 · up 1:02
//   REPLICA  STATE   RUNNING  WAITING  PAGES                 CACHED   STEPS  TOKENS/S  WORKERS
//   0        ready         3        0  ▆▆▆░░░░░  120/512        40    1203     512.0  127.0.0.1:50061 127.0.0.1:50062
// Failures follow under their replica. colour: ANSI escapes.
std::string FormatStatus(const v1::GetModelInfoResponse& model, const v1::GetStatusResponse& status, bool colour);

// {"ready", "version", "uptime_seconds", "model": {...}, "replicas": [...]} with the field names of inference.proto.
nlohmann::json StatusJson(const v1::GetModelInfoResponse& model, const v1::GetStatusResponse& status);

}  // namespace nibble
