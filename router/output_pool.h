// The threads between the schedulers and the clients' streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "common/base/bounded_queue.h"
#include "router/output.h"
#include "router/request_metrics.h"
#include "router/sequence.h"

namespace nibble {

// A stream's events are consumed by one thread, in order: the one its first sequence id picks.
class OutputPool {
 public:
  // `metrics` outlives the pool.
  OutputPool(uint32_t threads, RequestMetrics* metrics);
  ~OutputPool();  // consumes what is queued, then ends

  // Takes the events of one step (*events is left empty): for the caller one pointer per thread, however many events; each
  // thread picks its own. Waits only when the output threads are `kMaxBatches` behind,
  // which no client can cause: they never wait for one.
  void Deliver(std::vector<SequenceEvent>* events);

 private:
  static constexpr size_t kMaxBatches = 256;
  struct Batch {
    TimePoint committed_at;
    std::shared_ptr<std::vector<SequenceEvent>> events;  // shared by the threads; each touches only its own
  };
  void Run(size_t thread);

  RequestMetrics* const metrics_;
  std::vector<std::unique_ptr<BoundedQueue<Batch>>> queues_;
  std::vector<std::thread> threads_;
};

}  // namespace nibble
