#include "common/base/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/status/status.h"

namespace nibble {
namespace {

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }
  int Release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

absl::Status Failed(std::string_view verb, const std::string& path) {
  return absl::ErrnoToStatus(errno, "cannot " + std::string(verb) + " " + path);
}

}  // namespace

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes) {
  // O_NONBLOCK: opening a pipe nobody writes to must not hang a start-up.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.get() < 0) return Failed("open", path);
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return Failed("stat", path);
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(path + " is not a regular file");

  std::string contents;
  char buffer[16384];
  while (true) {
    const ssize_t n = ::read(file.get(), buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Failed("read", path);
    if (n == 0) return contents;
    contents.append(buffer, static_cast<size_t>(n));
    if (static_cast<int64_t>(contents.size()) > max_bytes) {
      return absl::InvalidArgumentError(path + " is larger than " + std::to_string(max_bytes) + " bytes");
    }
  }
}

absl::Status WriteFileAtomically(const std::string& path, std::string_view contents) {
  std::string beside = path + ".XXXXXX";
  FileDescriptor file(::mkostemp(beside.data(), O_CLOEXEC));
  if (file.get() < 0) return Failed("create a file beside", path);
  auto fail = [&](std::string_view verb) {
    absl::Status status = Failed(verb, path);
    ::unlink(beside.c_str());
    return status;
  };
  if (::fchmod(file.get(), 0644) != 0) return fail("set the mode of");
  for (size_t written = 0; written < contents.size();) {
    const ssize_t n = ::write(file.get(), contents.data() + written, contents.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return fail("write");
    written += static_cast<size_t>(n);
  }
  if (::fsync(file.get()) != 0) return fail("sync");
  if (::close(file.Release()) != 0) return fail("close");
  if (::rename(beside.c_str(), path.c_str()) != 0) return fail("rename onto");
  return absl::OkStatus();
}

}  // namespace nibble
