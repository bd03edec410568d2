// Runs a workload against a router: an open loop (requests leave when they are due, whether or not answers came) on
// gRPC's callback API, so thousands of streams need no threads of their own.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/base/progress.h"
#include "tools/bench/workload.h"
#include "tools/client/interrupt.h"

namespace nibble {

// Times are seconds; `sent_s` counts from the start of the run, the others from sending the request.
struct RequestRecord {
  bool sent = false;  // false: the run was interrupted before its turn
  grpc::StatusCode code = grpc::StatusCode::OK;
  std::string error;  // readable, when code is not OK
  double sent_s = 0;
  double latency_s = 0;       // to the last message with tokens; to the end of the call when it failed
  uint32_t input_tokens = 0;  // as the server counted them
  uint32_t output_tokens = 0;
  uint32_t cached_tokens = 0;
  uint32_t preemptions = 0;
  struct Chunk {
    float offset_s;  // arrival of a message with tokens
    uint32_t tokens;
  };
  std::vector<Chunk> chunks;

  bool ok() const { return sent && code == grpc::StatusCode::OK; }
};

struct LoadOptions {
  int64_t max_concurrency = 0;   // 0 = no limit
  double request_timeout_s = 0;  // gRPC deadline of every request; 0 = none
  int64_t first_index = 0;       // of the workload
  int64_t num_requests = 0;
  bool at_once = false;  // ignore arrival times (warm-up)
};

struct LoadResult {
  double duration_s = 0;  // first request due → last one done
  bool interrupted = false;
  std::vector<RequestRecord> records;  // by request
};

// Streams are dealt to the channels in turn. With a limit on concurrency a due request waits for a free place, first
// come first served, and its times start when it is sent (as in vLLM). progress (optional) counts finished requests; a
// signal cancels everything in flight and ends the run early.
LoadResult RunLoad(const std::vector<std::shared_ptr<grpc::Channel>>& channels, const Workload& workload,
                   const LoadOptions& options, Progress* progress, Interrupt* interrupt);

}  // namespace nibble
