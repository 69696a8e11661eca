// Teams on a CPU, for tests: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for
// each other where those of a block do, so that a thread sanitizer can tell where one is missing to wait.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <bit>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

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
inline float float_of_bits(int bits) { return std::bit_cast<float>(bits); }
inline int bits_of(float x) { return std::bit_cast<int>(x); }
inline float quotient(float a, float b) { return a / b; }
inline float log_of_small(float x) { return logf(x); }
inline float ex2(float x) { return exp2f(x); }

// Between blocks that run side by side. What is looked at without acquiring is acquired here all the same: a fence is
// nothing that a thread sanitizer knows.
inline uint32_t come_to(uint32_t* counter, uint32_t wrap) {
  std::atomic_ref<uint32_t> shared(*counter);
  uint32_t before = shared.load();
  while (!shared.compare_exchange_weak(before, before >= wrap ? 0 : before + 1)) {
  }
  return before;
}
inline void acquire() {}
inline uint32_t add_to(uint32_t* counter, uint32_t more) { return std::atomic_ref<uint32_t>(*counter).fetch_add(more); }
inline uint32_t set_bits(uint32_t* word, uint32_t bits) { return std::atomic_ref<uint32_t>(*word).fetch_or(bits); }
inline uint32_t glance(const uint32_t* word) { return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(word)).load(); }
inline void compute_here(uint32_t&) {}
inline void wait_a_little() { std::this_thread::yield(); }

// What the threads of a block share.
class Block {
 public:
  Block() {
    for (auto& warp : warps_) warp = std::make_unique<std::barrier<>>(kLanes);
  }

 private:
  friend class Team;
  struct Slot {
    alignas(16) std::array<unsigned char, 16> bytes;
  };
  std::array<Slot, kThreads> slots_{};
  std::barrier<> all_{kThreads};
  std::array<std::unique_ptr<std::barrier<>>, kWarps> warps_;
  BlockMemory memory_{};
  float kept_[kLoads * kElements][kThreads]{};
};

class Team {
 public:
  Team(Block& block, int rank) : block_(block), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return kThreads; }
  int lane() const { return rank_ % kLanes; }
  int warp() const { return rank_ / kLanes; }
  BlockMemory& memory() const { return block_.memory_; }
  float& kept(int k) const { return block_.kept_[k][rank_]; }
  static void set(float (&x)[kLoads], int u, float value) { x[u] = value; }
  void sync() const {
    if constexpr (kThreads > 1) block_.all_.arrive_and_wait();
  }

  // As shuffles do, each with its opposite.
  template <class T, class F>
  T in_warp(const T& x, const F& combine) const {
    return folded(of_warp(x), combine);
  }
  Arrived first_in_warp(const Arrived& mine) const { return in_warp(mine, Earlier()); }
  // A tile has sixteen of the pieces that follow each other through the lanes and their loads.
  template <class F>
  void per_tile(const float (&x)[kLoads], const F& combine, float (&own)[kOwnTiles]) const {
    constexpr int kPieces = kTileIds / kElements;
    std::array<float, kSpan / kElements> all;
    for (int u = 0; u < kLoads; ++u) {
      const auto lanes = of_warp(x[u]);
      std::copy(lanes.begin(), lanes.end(), all.begin() + u * kLanes);
    }
    for (int k = 0; k < kOwnTiles; ++k) {
      std::array<float, kPieces> tile;
      std::copy_n(all.begin() + (own_tile() + k) * kPieces, kPieces, tile.begin());
      own[k] = folded(tile, combine);
    }
  }
  int own_tile() const { return kLanes == 1 ? 0 : (lane() >> 1 & 4) + (lane() >> 1 & 2) + (lane() >> 4); }
  bool leads_tile() const { return lane() % 4 == 0; }
  template <class F>
  uint32_t bits(const F& f) const {
    uint32_t word = 0;
    for (int bit = lane(); bit < 32; bit += kLanes) word |= uint32_t(f(bit)) << bit;
    return in_warp(word, Plus());
  }

  template <class T, class F>
  T reduce(const T& x, const F& combine) const {
    const auto all = of_block(x);
    T result = all[0];
    for (int thread = 1; thread < kThreads; ++thread) result = combine(result, all[size_t(thread)]);
    return result;
  }
  bool any(bool x) const { return reduce(int(x), Larger()) != 0; }
  int before(int x, int& all) const {
    const auto each = of_block(x);
    all = std::accumulate(each.begin(), each.end(), 0);
    return std::accumulate(each.begin(), each.begin() + rank_, 0);
  }
  int of_first(int x) const { return of_block(x)[0]; }

 private:
  template <class T, class Wait, size_t kCount>
  void exchange(const T& x, const Wait& wait, int first, std::array<T, kCount>& all) const {
    static_assert(sizeof(T) <= sizeof(Block::Slot));
    std::memcpy(&block_.slots_[size_t(rank_)].bytes, &x, sizeof(T));
    wait();
    for (size_t k = 0; k < kCount; ++k)
      std::memcpy(static_cast<void*>(&all[k]), &block_.slots_[size_t(first) + k].bytes, sizeof(T));
    wait();  // all have read what the next call overwrites
  }
  template <class T>
  std::array<T, kLanes> of_warp(const T& x) const {
    std::array<T, kLanes> all{x};
    if constexpr (kThreads > 1)
      exchange(x, [&] { block_.warps_[size_t(warp())]->arrive_and_wait(); }, warp() * kLanes, all);
    return all;
  }
  template <class T>
  std::array<T, kThreads> of_block(const T& x) const {
    std::array<T, kThreads> all{x};
    sync();  // a warp that is ahead must not overwrite what another one exchanges
    if constexpr (kThreads > 1) exchange(x, [&] { sync(); }, 0, all);
    return all;
  }
  template <class T, size_t kCount, class F>
  static T folded(std::array<T, kCount> all, const F& combine) {
    for (size_t half = kCount / 2; half > 0; half /= 2)
      for (size_t k = 0; k < half; ++k) all[k] = combine(all[k], all[k + half]);
    return all[0];
  }

  Block& block_;
  const int rank_;
};

}  // namespace specdec::cuda
