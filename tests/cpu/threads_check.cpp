// Chains verified by several threads, to be run under the thread sanitizer, which knows nothing of PyTorch's own: a
// batch of one and a batch of three, whose idle threads help. The tokens must be those of one thread.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <latch>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/thread_group.h"
#include "../../csrc/cpu/verify.h"

namespace {

using namespace specdec;

// All begin at once, or the first would be through before the others are there.
void on_threads(int64_t threads, void (*body)(void*), void* context) {
  std::latch there(threads);
  const auto member = [&] {
    there.arrive_and_wait();
    body(context);
  };
  std::vector<std::jthread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(member);
  member();
}

struct Chains {
  static constexpr int64_t kRows = 5, kVocab = 50'000;

  Chains(int64_t requests, unsigned seed) : batch(requests), target(size_t(batch * kRows * kVocab)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    for (float& x : target) x = normal(random);
    for (int64_t b = 0; b < batch; ++b) {
      seeds.push_back(int64_t(random()));
      for (int64_t i = 0; i + 1 < kRows; ++i) {  // the likeliest, so that many are accepted
        const float* row = &target[size_t((b * kRows + i) * kVocab)];
        tokens.push_back(std::max_element(row, row + kVocab) - row);
      }
    }
  }

  std::vector<int64_t> verified(float temperature, int64_t threads) const {
    std::vector<int64_t> out(size_t(batch * kRows));
    std::vector<int32_t> accepted(size_t(batch), 0), counters(size_t(2 * batch), 0);
    const std::unique_ptr<bool[]> valid(new bool[size_t(batch)]);
    Verification all{};
    all.batch = batch, all.rows = kRows, all.vocab = kVocab;
    all.target = {.data = target.data(), .request_stride = kRows * kVocab, .row_stride = kVocab};
    all.tokens = {.data = tokens.data()};
    all.token_strides[0] = kRows - 1, all.token_strides[1] = 1;
    all.seed = seeds.data(), all.position = seeds.data();
    all.sampling.temperature = temperature;
    all.out_tokens = out.data(), all.out_accepted = accepted.data(), all.out_valid = valid.get();
    VerifyChain chain{};
    chain.common = all, chain.out_counters = counters.data();
    verify_chain(chain, threads, on_threads);
    return out;
  }

  int64_t batch;
  std::vector<float> target;
  std::vector<int64_t> tokens, seeds;
};

// A pass of two pieces of which another thread does one, however late it is: who is done first waits for the other. The
// counter orders nothing.
bool is_shared() {
  SharedPass pass;
  std::atomic<int> drawn{0};
  uint32_t done[2] = {};
  std::jthread other([&] {
    while (!pass.help()) std::this_thread::yield();
  });
  pass.run(2, [&](uint32_t piece) {
    done[piece] = piece + 1;
    drawn.fetch_add(1, std::memory_order_relaxed);
    while (drawn.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
  });
  return done[0] == 1 && done[1] == 2;
}

}  // namespace

int main() {
  if (!is_shared()) return 1;
  for (unsigned seed = 0; seed < 10; ++seed)
    for (const int64_t batch : {1, 3}) {
      const Chains chains(batch, seed);
      for (const float temperature : {0.0f, 0.05f, 0.7f})  // 0.05: tiles with weights of their own base
        for (const int64_t threads : {2, 3})
          if (chains.verified(temperature, threads) != chains.verified(temperature, 1)) return 1;
    }
  std::puts("the same");
}
