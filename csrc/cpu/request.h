// What operations on requests share: their rows and parameters, the memory of a thread, and the threads.
#pragma once

#include <algorithm>
#include <vector>

#include "distribution.h"
#include "verify.h"

namespace specdec {

inline Row row_at(const Logits& logits, int64_t vocab, int64_t offset, const int32_t* columns = nullptr) {
  return {address(logits, offset), logits.dtype, vocab, {columns, int(logits.width)}};
}

inline Sampling sampling_of(const SamplingParameters& all, int64_t request) {
  const SamplingParameters own = all.of(request);
  return {scale_of(own.temperature), {own.top_k, own.top_p, own.min_p}};
}

// The scratch of one thread, kept between calls.
struct Scratch {
  std::vector<TileSpace> targets;
  TileSpace draft;
};

inline Scratch& scratch() {
  static thread_local Scratch spaces;
  return spaces;
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 14;

inline int64_t useful_threads(int64_t requests, int64_t vocab, int64_t threads) {
  return std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, requests * vocab / kSerialElements));
}

// Calls request(index, workers) for each.
template <class F>
void each_request(int64_t requests, int64_t vocab, int64_t threads, RunOnThreads run, const F& request) {
  const Kernels& table = *kernels();
  threads = useful_threads(requests, vocab, threads);
  const auto each = [&](int64_t index, SharedPass& pass) { request(index, Workers{table, threads, pass}); };
  ThreadGroup group(requests, threads, each);
  using Group = decltype(group);
  if (threads == 1)
    group.join();
  else
    run(threads, [](void* context) { static_cast<Group*>(context)->join(); }, &group);
}

}  // namespace specdec
