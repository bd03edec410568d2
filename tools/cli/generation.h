// One Generate call from the client's side: the stream put together, with the times a person feels.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "nibble/v1/inference.grpc.pb.h"
#include "tools/client/interrupt.h"
#include "tools/client/rpc_error.h"

namespace nibble {

struct Generation {
  struct Sequence {
    std::string text;
    std::vector<uint32_t> token_ids;
    std::vector<v1::TokenLogprobs> logprobs;
    std::optional<v1::Finish> finish;  // absent when the stream broke off
  };
  grpc::Status status;
  std::string request_id;
  std::vector<Sequence> sequences;  // one per n, by index
  std::vector<v1::TokenLogprobs> prompt_logprobs;
  std::optional<double> ttft_ms;  // send → first token of any sequence; absent without a token
  double e2e_ms = 0;              // send → last message

  int64_t completion_tokens() const;  // over all sequences
  // Tokens after the first one per second of the time after the first one (1 / TPOT); absent below two tokens.
  std::optional<double> tokens_per_second() const;
};

struct CallOptions {
  std::optional<double> deadline_s;  // the gRPC deadline, which is the request's deadline
  Interrupt* interrupt = nullptr;    // optional: a signal cancels the call
};

// Runs the call to its end. on_response (optional) sees every message after it was added to the result; returning false
// cancels the call. Messages with an index ≥ n end it with INTERNAL: a server must not make the client grow.
Generation RunGenerate(v1::Inference::StubInterface* stub, const v1::GenerateRequest& request,
                       const CallOptions& options,
                       const std::function<bool(const v1::GenerateResponse&)>& on_response = nullptr);

// The object that --json prints; docs/cli.md describes it. Fields of the first sequence are at the top, `choices` is
// there when n > 1, `error` when the call failed.
nlohmann::json GenerationJson(const Generation& generation);

// "stop", "length"; empty when unspecified.
const char* FinishReasonName(v1::FinishReason reason);

// "96 tokens (12 prompt, 0 cached) · first token 31 ms · 162 tokens/s · length"
std::string GenerationSummary(const Generation& generation);

}  // namespace nibble
