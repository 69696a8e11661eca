// Blocks on a CPU: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for each other
// where those of a block do, so that a thread sanitizer finds where one does not wait.
#pragma once

#include <array>
#include <atomic>
#include <thread>

#include <pthread.h>

namespace specdec::cuda {

inline auto load_l2(const auto* p) { return *p; }
inline auto load_streaming(const auto* p) { return *p; }
inline auto uniform_value(const auto& x) { return x; }
inline void store_l2(auto* p, const auto& x) { *p = x; }
inline float quotient(float a, float b) { return a / b; }
inline float log_of_small(float x) { return logf(x); }
inline float ex2(float x) { return exp2f(x); }

// Between blocks that run side by side, in no other order than a GPU's. Thread sanitizers do not know fences: what is
// acquired is what was released to one counter.
inline std::atomic_ref<uint32_t> shared(const uint32_t* word) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(word));
}
inline uint32_t atomic_inc(uint32_t* counter, uint32_t wrap) {
  uint32_t before = shared(counter).load(std::memory_order_relaxed);
  while (!shared(counter).compare_exchange_weak(before, before >= wrap ? 0 : before + 1, std::memory_order_release,
                                                std::memory_order_relaxed)) {
  }
  return before;
}
inline uint32_t atomic_add(uint32_t* counter, uint32_t more) { return shared(counter).fetch_add(more); }
inline uint32_t atomic_or(uint32_t* word, uint32_t bits) { return shared(word).fetch_or(bits); }
inline void fence_acquire(const uint32_t* counter) { shared(counter).load(std::memory_order_acquire); }
inline uint32_t load_relaxed(const uint32_t* word) { return shared(word).load(std::memory_order_relaxed); }
inline void compute_here(uint32_t&) {}
inline void wait_a_little() { std::this_thread::yield(); }

// Not the standard library's, whose barriers share what they wait by: a thread sanitizer would take blocks to wait for
// each other that do not.
struct Barrier {
  explicit Barrier(unsigned threads) { pthread_barrier_init(&all, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&all); }
  void wait() { pthread_barrier_wait(&all); }
  pthread_barrier_t all;
};

// What the threads of a block share.
struct BlockState {
  struct Warp {
    Barrier all{kLanes};
    struct alignas(16) {
      unsigned char bytes[16];
    } slots[2][kLanes]{};
  };
  Barrier all{kThreads};
  std::array<Warp, kWarps> warps;
  BlockMemory memory{};
};

// The thread that runs this: whose it is, and which one of it.
struct Thread {
  BlockState* block;
  int rank;
  int64_t block_index;
  int shuffles = 0;
};
inline constinit thread_local Thread current{};
inline int64_t block_index() { return current.block_index; }

namespace block {

inline int rank() { return kThreads == 1 ? 0 : current.rank; }
inline int lane() { return rank() % kLanes; }
inline BlockMemory& memory() { return current.block->memory; }
inline void sync() {
  if constexpr (kThreads > 1) current.block->all.wait();
}
template <class T, class F>
T reduce(T x, const F& combine);
inline bool any(bool x) { return reduce(int(x), std::plus<>()) != 0; }

template <class T>
T shuffled(T x, int mask) {
  BlockState::Warp& warp = current.block->warps[rank() / kLanes];
  auto& slots = warp.slots[++current.shuffles % 2];  // those of the last one may still be read
  static_assert(sizeof(T) <= sizeof slots[0]);
  std::memcpy(&slots[rank() % kLanes], &x, sizeof(T));
  warp.all.wait();
  std::memcpy(static_cast<void*>(&x), &slots[(rank() ^ mask) % kLanes], sizeof(T));
  return x;
}

// A thread that is a warp has sixteen loads of each tile, which it combines as the lanes of one do.
template <class F>
void put_tiles(const float (&x)[kSpan / kElements], int /*own_tile*/, const F& combine, float* tiles) {
  constexpr int kPieces = kTileIds / kElements;
  for (int tile = 0; tile < kTilesOfSpan; ++tile) {
    float each[kPieces];
    std::copy_n(x + tile * kPieces, kPieces, each);
    for (int half = kPieces / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) each[k] = combine(each[k], each[k + half]);
    tiles[tile] = each[0];
  }
}

}  // namespace block

}  // namespace specdec::cuda
