#include "common/rpc/tls.h"

#include <spdlog/fmt/fmt.h>

#include <string_view>
#include <utility>

#include "common/base/file.h"
#include "common/base/status.h"

namespace nibble {
namespace {

absl::StatusOr<std::string> ReadPem(const std::string& path, std::string_view what) {
  if (path.empty()) return std::string();
  absl::StatusOr<std::string> pem = ReadSmallFile(path);
  if (!pem.ok()) return Annotate(pem.status(), what);
  if (pem->find("-----BEGIN ") == std::string::npos) {
    return absl::InvalidArgumentError(fmt::format("{}: {} holds no PEM block", what, path));
  }
  return pem;
}

absl::Status CheckPair(const TlsOptions& tls) {
  if (tls.certificate_file.empty() == tls.key_file.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(tls.key_file.empty() ? "TLS certificate given without its private key"
                                                         : "TLS private key given without its certificate");
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureServerCredentials();
  NIBBLE_RETURN_IF_ERROR(CheckPair(tls));
  if (tls.certificate_file.empty()) {
    return absl::InvalidArgumentError("a TLS CA without certificate and private key: a server needs both");
  }
  grpc::SslServerCredentialsOptions options(tls.ca_file.empty()
                                                ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  grpc::SslServerCredentialsOptions::PemKeyCertPair pair;
  NIBBLE_ASSIGN_OR_RETURN(pair.private_key, ReadPem(tls.key_file, "TLS private key"));
  NIBBLE_ASSIGN_OR_RETURN(pair.cert_chain, ReadPem(tls.certificate_file, "TLS certificate"));
  NIBBLE_ASSIGN_OR_RETURN(options.pem_root_certs, ReadPem(tls.ca_file, "TLS CA"));
  options.pem_key_cert_pairs.push_back(std::move(pair));
  return grpc::SslServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(const TlsOptions& tls) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  NIBBLE_RETURN_IF_ERROR(CheckPair(tls));
  if (tls.ca_file.empty()) {
    return absl::InvalidArgumentError(
        "a TLS certificate without a CA: a client needs the CA of the server it talks to");
  }
  grpc::SslCredentialsOptions options;
  NIBBLE_ASSIGN_OR_RETURN(options.pem_root_certs, ReadPem(tls.ca_file, "TLS CA"));
  NIBBLE_ASSIGN_OR_RETURN(options.pem_private_key, ReadPem(tls.key_file, "TLS private key"));
  NIBBLE_ASSIGN_OR_RETURN(options.pem_cert_chain, ReadPem(tls.certificate_file, "TLS certificate"));
  return grpc::SslCredentials(options);
}

}  // namespace nibble
