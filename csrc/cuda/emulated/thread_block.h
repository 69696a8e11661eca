// Blocks on a CPU: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for each other
// where those of a block do, so that a thread sanitizer finds where one does not wait.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <numeric>
#include <thread>

#ifndef SPECDEC_EMULATED_THREADS
#define SPECDEC_EMULATED_THREADS 1
#endif

namespace specdec::cuda {

constexpr int kThreads = SPECDEC_EMULATED_THREADS, kLanes = kThreads == 1 ? 1 : 32, kWarps = kThreads / kLanes;
constexpr int kLoads = kSpan / (kElements * kLanes);
constexpr int kOwnTiles = kLanes == 1 ? kTilesOfSpan : 1;

template <class T>
T fresh(const T* p) {
  return *p;
}
template <class T>
void put(T* p, const T& x) {
  *p = x;
}
inline int count_bits(uint32_t word) { return std::popcount(word); }
inline int first_bit(uint32_t word) { return std::countr_zero(word); }
inline float quotient(float a, float b) { return a / b; }
inline float log_of_small(float x) { return logf(x); }
inline float ex2(float x) { return exp2f(x); }

// Between blocks that run side by side. A relaxed load acquires here, since thread sanitizers do not know fences.
inline uint32_t come_to(uint32_t* counter, uint32_t wrap) {
  std::atomic_ref<uint32_t> shared(*counter);
  uint32_t before = shared.load();
  while (!shared.compare_exchange_weak(before, before >= wrap ? 0 : before + 1)) {
  }
  return before;
}
inline uint32_t add_to(uint32_t* counter, uint32_t more) { return std::atomic_ref<uint32_t>(*counter).fetch_add(more); }
inline uint32_t set_bits(uint32_t* word, uint32_t bits) { return std::atomic_ref<uint32_t>(*word).fetch_or(bits); }
inline void acquire() {}
inline uint32_t glance(const uint32_t* word) { return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(word)).load(); }
inline void compute_here(uint32_t&) {}
inline void wait_a_little() { std::this_thread::yield(); }

// What the threads of a block share.
struct BlockState {
  struct Warp : std::barrier<> {
    Warp() : std::barrier<>(kLanes) {}
  };
  std::barrier<> all{kThreads};
  std::array<Warp, kWarps> warps;
  struct alignas(16) {
    unsigned char bytes[16];
  } slots[kThreads]{};
  BlockMemory memory{};
};

// The thread that runs this: whose it is, and which one of it.
struct Thread {
  BlockState* block;
  int rank;
  int64_t block_index;
};
inline constinit thread_local Thread current{};
inline int64_t block_index() { return current.block_index; }

class ThreadBlock {
 public:
  static int rank() { return kThreads == 1 ? 0 : current.rank; }
  static int lane() { return rank() % kLanes; }
  static int warp() { return rank() / kLanes; }
  static BlockMemory& memory() { return current.block->memory; }
  static void sync() {
    if constexpr (kThreads > 1) current.block->all.arrive_and_wait();
  }

  // As shuffles do, each with its opposite.
  template <class T, class F>
  static T in_warp(const T& x, const F& combine) {
    return folded(of_warp(x), combine);
  }
  static Arrived first_in_warp(const Arrived& mine) { return in_warp(mine, Earlier()); }
  // A tile has sixteen of the pieces that follow each other through the lanes and their loads.
  template <class F>
  static void per_tile(const float (&x)[kLoads], const F& combine, float (&own)[kOwnTiles]) {
    constexpr int kPieces = kTileIds / kElements;
    std::array<float, kSpan / kElements> all;
    for (int u = 0; u < kLoads; ++u) std::ranges::copy(of_warp(x[u]), all.begin() + u * kLanes);
    for (int k = 0; k < kOwnTiles; ++k) {
      std::array<float, kPieces> tile;
      std::copy_n(all.begin() + (own_tile() + k) * kPieces, kPieces, tile.begin());
      own[k] = folded(tile, combine);
    }
  }
  static int own_tile() { return kLanes == 1 ? 0 : (lane() >> 1 & 4) + (lane() >> 1 & 2) + (lane() >> 4); }
  static bool leads_tile() { return lane() % 4 == 0; }
  template <class F>
  static uint32_t bits(const F& f) {
    uint32_t word = 0;
    for (int bit = lane(); bit < 32; bit += kLanes) word |= uint32_t(f(bit)) << bit;
    return in_warp(word, Plus());
  }

  template <class T, class F>
  static T reduce(const T& x, const F& combine) {
    const auto all = of_block(x);
    return std::accumulate(all.begin() + 1, all.end(), all[0], combine);
  }
  static bool any(bool x) { return reduce(int(x), Larger()) != 0; }
  static int before(int x, int& all) {
    const auto each = of_block(x);
    all = std::accumulate(each.begin(), each.end(), 0);
    return std::accumulate(each.begin(), each.begin() + rank(), 0);
  }
  static int of_first(int x) { return of_block(x)[0]; }

 private:
  // What threads that wait for each other have, from the first of them on.
  template <int kCount, class T>
  static std::array<T, kCount> exchanged(const T& x, std::barrier<>& barrier, int first) {
    static_assert(sizeof(T) <= sizeof(BlockState::slots[0]));
    std::array<T, kCount> all{x};
    if constexpr (kCount > 1) {
      std::memcpy(&current.block->slots[rank()], &x, sizeof(T));
      barrier.arrive_and_wait();
      for (int k = 0; k < kCount; ++k)
        std::memcpy(static_cast<void*>(&all[k]), &current.block->slots[first + k], sizeof(T));
      barrier.arrive_and_wait();  // all have read what the next call overwrites
    }
    return all;
  }
  template <class T>
  static std::array<T, kLanes> of_warp(const T& x) {
    return exchanged<kLanes>(x, current.block->warps[warp()], warp() * kLanes);
  }
  template <class T>
  static std::array<T, kThreads> of_block(const T& x) {
    return exchanged<kThreads>(x, current.block->all, 0);
  }
  template <class T, size_t kCount, class F>
  static T folded(std::array<T, kCount> all, const F& combine) {
    for (size_t half = kCount / 2; half > 0; half /= 2)
      for (size_t k = 0; k < half; ++k) all[k] = combine(all[k], all[k + half]);
    return all[0];
  }
};

}  // namespace specdec::cuda
