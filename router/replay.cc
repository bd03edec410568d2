#include "router/replay.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace nibble {

ReplayQueue::ReplayQueue(std::function<void(std::unique_ptr<Sequence>, TimePoint)> place,
                         std::function<void(std::unique_ptr<Sequence>)> give_up)
    : place_(std::move(place)), give_up_(std::move(give_up)), thread_(&ReplayQueue::Run, this) {}

ReplayQueue::~ReplayQueue() { Stop(); }

void ReplayQueue::Park(std::unique_ptr<Sequence> sequence, TimePoint until) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!stop_) {
      parked_.push_back({until, std::move(sequence)});
      changed_.notify_one();
      return;
    }
  }
  give_up_(std::move(sequence));
}

void ReplayQueue::Wake() {
  std::lock_guard<std::mutex> lock(mutex_);
  wake_ = true;
  changed_.notify_one();
}

ReplayQueue::Load ReplayQueue::load() {
  std::lock_guard<std::mutex> lock(mutex_);
  Load load;
  for (const Parked& parked : parked_) {
    ++load.sequences;
    load.prompt_tokens += parked.sequence->num_prompt_tokens;
  }
  return load;
}

void ReplayQueue::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void ReplayQueue::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    TimePoint next = TimePoint::max();
    for (const Parked& parked : parked_) next = std::min(next, parked.until);
    const auto something = [this] { return stop_ || (wake_ && !parked_.empty()); };
    if (next == TimePoint::max()) {
      changed_.wait(lock, [&] { return something() || !parked_.empty(); });
    } else {
      changed_.wait_until(lock, next, something);
    }
    std::vector<Parked> all = std::exchange(parked_, {});
    const bool wake = std::exchange(wake_, false), stop = stop_;
    lock.unlock();
    const TimePoint now = Clock::now();
    std::vector<Parked> keep;
    for (Parked& parked : all) {
      if (stop || parked.until <= now) {
        give_up_(std::move(parked.sequence));
      } else if (wake) {
        place_(std::move(parked.sequence), parked.until);
      } else {
        keep.push_back(std::move(parked));
      }
    }
    lock.lock();
    parked_.insert(parked_.begin(), std::make_move_iterator(keep.begin()), std::make_move_iterator(keep.end()));
    if (stop) return;
  }
}

}  // namespace nibble
