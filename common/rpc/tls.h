// TLS from PEM files, the same options for servers and channels.
#pragma once

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace nibble {

// All empty: no TLS. A server needs certificate_file and key_file; with ca_file it also demands a client certificate
// signed by that CA (mutual TLS). A channel needs ca_file; certificate_file and key_file are what it shows to a server
// that asks.
struct TlsOptions {
  std::string certificate_file;  // PEM chain, leaf first
  std::string key_file;          // PEM private key
  std::string ca_file;           // PEM certificates trusted to sign the other side's

  bool enabled() const { return !certificate_file.empty() || !key_file.empty() || !ca_file.empty(); }
};

// INVALID_ARGUMENT for a combination that cannot work, NOT_FOUND / PERMISSION_DENIED for a file, each naming it.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const TlsOptions& tls);
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(const TlsOptions& tls);

}  // namespace nibble
