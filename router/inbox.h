// A bounded mailbox: many threads put, one takes everything at once.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

#include "router/sequence.h"

namespace nibble {

template <typename Message>
class Inbox {
 public:
  // Put refuses beyond `capacity`; PutUrgent never does: it is for messages whose number their cause bounds (at most one
  // cancel per sequence, one result per step in flight).
  explicit Inbox(size_t capacity) : capacity_(capacity) {}

  // A closed inbox refuses what Put brings. PutUrgent still works: whoever waits must be wakeable.
  void Open() { SetOpen(true); }
  void Close() { SetOpen(false); }

  // False: closed or full; the message is untouched.
  bool Put(Message&& message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!open_ || messages_.size() >= capacity_) return false;
    messages_.push_back(std::move(message));
    ready_.notify_one();
    return true;
  }
  void PutUrgent(Message&& message) {
    std::lock_guard<std::mutex> lock(mutex_);
    messages_.push_back(std::move(message));
    ready_.notify_one();
  }

  // Everything there is, in order of arrival; waits for the first message until `until`. *out is cleared first.
  void Take(TimePoint until, std::vector<Message>* out) {
    out->clear();
    std::unique_lock<std::mutex> lock(mutex_);
    if (until == TimePoint::max()) {
      ready_.wait(lock, [this] { return !messages_.empty(); });
    } else {
      ready_.wait_until(lock, until, [this] { return !messages_.empty(); });
    }
    out->swap(messages_);
  }

 private:
  void SetOpen(bool open) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = open;
  }

  const size_t capacity_;
  std::mutex mutex_;
  std::condition_variable ready_;
  bool open_ = false;
  std::vector<Message> messages_;
};

}  // namespace nibble
