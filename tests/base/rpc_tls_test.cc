// TLS and mutual TLS with certificates made on the spot.
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>

#include "common/base/file.h"
#include "common/rpc/channel.h"
#include "common/rpc/server.h"
#include "nibble/v1/worker.grpc.pb.h"

namespace nibble {
namespace {

using KeyPtr = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using CertificatePtr = std::unique_ptr<X509, decltype(&X509_free)>;

template <typename Write>
std::string ToPem(Write write) {
  std::unique_ptr<BIO, decltype(&BIO_free)> bio(BIO_new(BIO_s_mem()), &BIO_free);
  EXPECT_EQ(write(bio.get()), 1);
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return std::string(data, static_cast<size_t>(size));
}

// A P-256 key and a certificate for "localhost" and 127.0.0.1, valid for an hour. `issuer` null: signed by itself, a
// CA.
struct Identity {
  explicit Identity(const std::string& name, const Identity* issuer = nullptr)
      : key(EVP_EC_gen("P-256"), &EVP_PKEY_free), certificate(X509_new(), &X509_free) {
    X509* x = certificate.get();
    X509_set_version(x, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(x), issuer == nullptr ? 1 : 2);
    X509_gmtime_adj(X509_getm_notBefore(x), -60);
    X509_gmtime_adj(X509_getm_notAfter(x), 3600);
    X509_set_pubkey(x, key.get());
    X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    const Identity& signer = issuer == nullptr ? *this : *issuer;
    X509_set_issuer_name(x, X509_get_subject_name(signer.certificate.get()));
    const char* value = issuer == nullptr ? "critical,CA:TRUE" : "DNS:localhost,IP:127.0.0.1";
    X509_EXTENSION* extension =
        X509V3_EXT_conf_nid(nullptr, nullptr, issuer == nullptr ? NID_basic_constraints : NID_subject_alt_name, value);
    X509_add_ext(x, extension, -1);
    X509_EXTENSION_free(extension);
    EXPECT_GT(X509_sign(x, signer.key.get(), EVP_sha256()), 0);
  }

  std::string KeyPem() const {
    return ToPem(
        [&](BIO* bio) { return PEM_write_bio_PrivateKey(bio, key.get(), nullptr, nullptr, 0, nullptr, nullptr); });
  }
  std::string CertificatePem() const {
    return ToPem([&](BIO* bio) { return PEM_write_bio_X509(bio, certificate.get()); });
  }

  KeyPtr key;
  CertificatePtr certificate;
};

class InfoWorker : public v1::Worker::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetInfo(grpc::CallbackServerContext* context, const v1::GetInfoRequest*,
                                    v1::WorkerInfo*) override {
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
};

class RpcTls : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "nibble_tls_XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
    const Identity ca("the CA");
    const Identity other_ca("another CA");
    Save("server", Identity("server", &ca));
    Save("client", Identity("client", &ca));
    Save("stranger", Identity("stranger", &other_ca));
    Save("ca", ca);
    Save("other_ca", other_ca);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Save(const std::string& name, const Identity& identity) {
    ASSERT_TRUE(WriteFileAtomically(Certificate(name), identity.CertificatePem()).ok());
    ASSERT_TRUE(WriteFileAtomically(Key(name), identity.KeyPem()).ok());
  }
  std::string Certificate(const std::string& name) const { return dir_ + "/" + name + ".pem"; }
  std::string Key(const std::string& name) const { return dir_ + "/" + name + ".key"; }

  absl::StatusOr<std::unique_ptr<RpcServer>> Serve(const TlsOptions& tls) {
    grpc::Service* services[] = {&service_};
    RpcServerOptions options;
    options.listen = "127.0.0.1:0";
    options.tls = tls;
    return RpcServer::Start(options, services);
  }
  static grpc::StatusCode Call(const RpcServer& server, const TlsOptions& tls) {
    auto channel = CreateChannel(server.address().ToString(), {.tls = tls});
    EXPECT_TRUE(channel.ok()) << channel.status();
    auto stub = v1::Worker::NewStub(*channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::WorkerInfo info;
    return stub->GetInfo(&context, {}, &info).error_code();
  }

  std::string dir_;
  InfoWorker service_;
};

TEST_F(RpcTls, TheClientChecksTheServer) {
  auto server = Serve({.certificate_file = Certificate("server"), .key_file = Key("server")});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ(Call(**server, {.ca_file = Certificate("ca")}), grpc::StatusCode::OK);
  EXPECT_EQ(Call(**server, {.ca_file = Certificate("other_ca")}), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Call(**server, {}), grpc::StatusCode::UNAVAILABLE) << "plaintext";
}

TEST_F(RpcTls, MutualTlsKeepsStrangersOut) {
  auto server =
      Serve({.certificate_file = Certificate("server"), .key_file = Key("server"), .ca_file = Certificate("ca")});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ(Call(**server,
                 {.certificate_file = Certificate("client"), .key_file = Key("client"), .ca_file = Certificate("ca")}),
            grpc::StatusCode::OK);
  EXPECT_EQ(Call(**server, {.ca_file = Certificate("ca")}), grpc::StatusCode::UNAVAILABLE) << "no certificate";
  EXPECT_EQ(
      Call(**server,
           {.certificate_file = Certificate("stranger"), .key_file = Key("stranger"), .ca_file = Certificate("ca")}),
      grpc::StatusCode::UNAVAILABLE)
      << "a certificate of another CA";
}

TEST_F(RpcTls, AKeyOfAnotherCertificateIsAClearError) {
  const auto server = Serve({.certificate_file = Certificate("server"), .key_file = Key("client")});
  EXPECT_EQ(server.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(server.status().message().find("do not belong together"), std::string::npos) << server.status();
}

TEST_F(RpcTls, ChannelOptionsAreChecked) {
  const auto code = [](const TlsOptions& tls) { return CreateChannel("localhost:1", {.tls = tls}).status().code(); };
  EXPECT_EQ(code({.certificate_file = Certificate("client"), .key_file = Key("client")}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.certificate_file = Certificate("client"), .ca_file = Certificate("ca")}),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.ca_file = dir_ + "/none.pem"}), absl::StatusCode::kNotFound);
  EXPECT_EQ(code({.ca_file = Certificate("ca")}), absl::StatusCode::kOk);
}

}  // namespace
}  // namespace nibble
