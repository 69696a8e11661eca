// Threads that finish one request and help with another, so that a batch of one uses every core.
//
// Requests are handed out one at a time. Inside a request each pass over a row is cut into pieces, handed out by a
// ticket that idle threads draw from as well. Nobody ever waits for work that has not been started by a running thread,
// so the scheme is free of deadlocks whatever the thread pool does: with one thread it is a plain loop.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace specdec {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// One pass over a row, shared: `work(piece)` for every piece, results independent of who does which.
class SharedPass {
 public:
  // The owner: publishes the pass, works on it, returns when all of it is done.
  template <class F>
  void run(uint32_t pieces, const F& work) {
    invoke_ = [](const void* f, uint32_t piece) { (*static_cast<const F*>(f))(piece); };
    work_ = &work;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(uint64_t(pieces) << 32, std::memory_order_release);
    help();
    while (done_.load(std::memory_order_acquire) != pieces) relax();
  }

  // Anybody: draws pieces until there are none; false if there was none to begin with. A drawn piece keeps the owner
  // inside `run`, so what `work_` points to is alive; an exhausted ticket touches nothing else.
  bool help() {
    bool helped = false;
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_relaxed);
      if (uint32_t(ticket) >= uint32_t(ticket >> 32)) return helped;
      ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
      const uint32_t piece = uint32_t(ticket);
      if (piece >= uint32_t(ticket >> 32)) return helped;
      invoke_(work_, piece);
      done_.fetch_add(1, std::memory_order_release);
      helped = true;
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> ticket_{0};  // pieces in the high half, the next one in the low half
  alignas(64) std::atomic<uint32_t> done_{0};
  void (*invoke_)(const void*, uint32_t) = nullptr;
  const void* work_ = nullptr;
};

// `request(index, pass)` for every index below `requests`; each thread of the pool calls `join` once.
template <class F>
class ThreadGroup {
 public:
  ThreadGroup(int64_t requests, int64_t threads, const F& request)
      : requests_(requests), slots_(threads), passes_(new SharedPass[size_t(threads)]), request_(request) {}

  void join() {
    const int64_t slot = members_.fetch_add(1, std::memory_order_relaxed);
    if (slot >= slots_) return;
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < requests_;) {
      request_(index, passes_[size_t(slot)]);
      finished_.fetch_add(1, std::memory_order_release);
    }
    while (finished_.load(std::memory_order_acquire) < requests_) {
      bool helped = false;
      for (int64_t other = 0; other < slots_; ++other) helped |= passes_[size_t(other)].help();
      if (!helped) relax();
    }
  }

 private:
  const int64_t requests_, slots_;
  std::unique_ptr<SharedPass[]> passes_;
  const F& request_;
  std::atomic<int64_t> members_{0}, next_{0}, finished_{0};
};

}  // namespace specdec
