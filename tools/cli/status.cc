#include "tools/cli/status.h"

#include <CLI/CLI.hpp>
#include <chrono>
#include <map>
#include <ostream>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/cli/status_table.h"
#include "tools/client/rpc_error.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kPollPeriod = std::chrono::milliseconds(100);
constexpr auto kCallTimeout = std::chrono::seconds(5);

struct Snapshot {
  grpc::Status rpc;
  v1::GetModelInfoResponse model;
  v1::GetStatusResponse status;
};

Snapshot Ask(v1::Inference::StubInterface* stub) {
  Snapshot snapshot;
  const auto deadline = std::chrono::system_clock::now() + kCallTimeout;
  grpc::ClientContext status_context;
  status_context.set_deadline(deadline);
  snapshot.rpc = stub->GetStatus(&status_context, {}, &snapshot.status);
  if (!snapshot.rpc.ok()) return snapshot;
  grpc::ClientContext model_context;
  model_context.set_deadline(deadline);
  snapshot.rpc = stub->GetModelInfo(&model_context, {}, &snapshot.model);
  return snapshot;
}

bool Ready(const StatusFlags& flags, const v1::GetStatusResponse& status) {
  const int ready = ReadyReplicas(status);
  return flags.all ? ready == status.replicas_size() && ready > 0 : ready > 0;
}

// Polls until ready or the time is over, and says on err what each replica is doing whenever that changes.
Snapshot Wait(v1::Inference::StubInterface* stub, const StatusFlags& flags, const Console& console) {
  const Clock::time_point start = Clock::now();
  std::map<uint32_t, std::string> states;
  while (true) {
    Snapshot snapshot = Ask(stub);
    const double elapsed_s = std::chrono::duration<double>(Clock::now() - start).count();
    for (const v1::ReplicaStatus& replica : snapshot.status.replicas()) {
      std::string& known = states[replica.index()];
      if (known == replica.state()) continue;
      known = replica.state();
      console.err << console.Dim(absl::StrFormat("%6.1f s  replica %u %s", elapsed_s, replica.index(), known))
                  << std::endl;
    }
    const bool done = snapshot.rpc.ok() && Ready(flags, snapshot.status);
    if (done || elapsed_s >= flags.wait_s.value_or(0)) return snapshot;
    std::this_thread::sleep_for(kPollPeriod);
  }
}

void Print(const Snapshot& snapshot, const StatusFlags& flags, const Console& console) {
  if (flags.json) {
    console.out
        << StatusJson(snapshot.model, snapshot.status).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    console.out << std::endl;
  } else {
    console.out << FormatStatus(snapshot.model, snapshot.status, console.out_is_terminal) << std::flush;
  }
}

int PrintRpcError(const grpc::Status& status, const StatusFlags& flags, const Console& console) {
  const RpcError error = ReadRpcError(status);
  if (flags.json) {
    console.out << nlohmann::json{{"ready", false}, {"error", RpcErrorJson(error)}}.dump(
                       -1, ' ', false, nlohmann::json::error_handler_t::replace)
                << std::endl;
  }
  console.Error(FormatRpcError(error));
  // DEADLINE_EXCEEDED is our own call time-out here: the server is not reachable now.
  return status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ? int{kExitTryAgain} : error.exit_code;
}

int Watch(v1::Inference::StubInterface* stub, const StatusFlags& flags, const Console& console) {
  while (console.out.good()) {
    const Snapshot snapshot = Ask(stub);
    if (console.out_is_terminal && !flags.json) console.out << "\x1b[H\x1b[2J";
    if (snapshot.rpc.ok()) {
      Print(snapshot, flags, console);
    } else {
      PrintRpcError(snapshot.rpc, flags, console);
    }
    std::this_thread::sleep_for(std::chrono::duration<double>(flags.interval_s));
  }
  return kExitOk;
}

}  // namespace

void AddStatusFlags(CLI::App* app, StatusFlags* flags) {
  app->add_option("--wait", flags->wait_s, "Wait at most this many seconds until a replica is ready")
      ->check(CLI::Range(0.0, 1e9));
  app->add_flag("--all", flags->all, "Ready means every replica, not one");
  app->add_flag("--json", flags->json, "Print one JSON object");
  app->add_flag("--watch", flags->watch, "Print again and again until Ctrl-C");
  app->add_option("--interval", flags->interval_s, "Seconds between two prints of --watch")
      ->check(CLI::Range(0.05, 3600.0))
      ->capture_default_str();
}

int StatusCommand(v1::Inference::StubInterface* stub, const StatusFlags& flags, const Console& console,
                  Interrupt* interrupt) {
  const Snapshot snapshot = flags.wait_s ? Wait(stub, flags, console) : Ask(stub);
  const bool ready = snapshot.rpc.ok() && Ready(flags, snapshot.status);
  if (flags.watch && (ready || !flags.wait_s)) return Watch(stub, flags, console);
  if (!snapshot.rpc.ok()) return PrintRpcError(snapshot.rpc, flags, console);
  Print(snapshot, flags, console);
  if (ready) return kExitOk;
  console.Error(flags.wait_s ? absl::StrFormat("not ready after %g s", *flags.wait_s)
                             : absl::StrCat(flags.all ? "not every" : "no", " replica is ready"));
  return kExitTryAgain;
}

}  // namespace nibble
