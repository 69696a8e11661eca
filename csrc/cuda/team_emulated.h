// Teams on a CPU, for tests: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for
// each other where those of a block do, so that a thread sanitizer can tell where one is missing to wait.
#pragma once

#include <atomic>
#include <bit>
#include <memory>
#include <thread>
#include <vector>
#ifdef SPECDEC_EMULATED_THREADS
#include <array>
#include <barrier>
#endif

namespace specdec::cuda {

#ifdef SPECDEC_EMULATED_THREADS
constexpr int kThreads = SPECDEC_EMULATED_THREADS, kLanes = 32;
#else
constexpr int kThreads = 1, kLanes = 1;
#endif
constexpr int kWarps = kThreads / kLanes;
constexpr int kLoads = kSpan / (kElements * kLanes);
constexpr int kOwnTiles = kLanes == 1 ? kTilesOfSpan : 1;

template <class T>
T given(const T* p) {
  return *p;
}
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
inline void wait_a_little() { std::this_thread::yield(); }

// What the threads of a block share.
class Block {
 public:
#ifdef SPECDEC_EMULATED_THREADS
  Block() : all_(kThreads) {
    for (auto& warp : warps_) warp = std::make_unique<std::barrier<>>(kLanes);
  }

 private:
  friend class Team;
  struct Slot {
    alignas(16) std::array<unsigned char, 16> bytes;
  };
  std::array<Slot, kThreads> slots_{};
  std::barrier<> all_;
  std::array<std::unique_ptr<std::barrier<>>, kWarps> warps_;
#else
 private:
  friend class Team;
#endif
  BlockMemory memory_{};
};

class Team {
 public:
  Team(Block& block, int rank) : block_(block), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return kThreads; }
  int lane() const { return rank_ % kLanes; }
  int warp() const { return rank_ / kLanes; }
  BlockMemory& memory() const { return block_.memory_; }

#ifdef SPECDEC_EMULATED_THREADS
  void sync() const { block_.all_.arrive_and_wait(); }

  template <class T, class F>
  T in_warp(const T& x, const F& combine) const {
    return folded(of_warp(x), kLanes, 0, combine);
  }
  template <class F>
  void per_tile(const float (&x)[kLoads], const F& combine, float (&own)[kOwnTiles]) const {
    std::array<float, kLoads> mine;
    for (int u = 0; u < kLoads; ++u) mine[size_t(u)] = x[u];
    const auto all = of_warp(mine);
    std::array<float, kLanes> load;
    for (int lane = 0; lane < kLanes; ++lane) load[size_t(lane)] = all[size_t(lane)][size_t(own_tile(0) / 2)];
    own[0] = folded(load, kLanes / 2, own_tile(0) % 2 * kLanes / 2, combine);
  }
  int own_tile(int) const { return (lane() >> 1 & 4) + (lane() >> 1 & 2) + (lane() >> 4); }
  bool leads_tile() const { return lane() % 4 == 0; }
  template <class F>
  uint32_t bits(const F& f) const {
    return in_warp(uint32_t(f(lane())) << lane(), Plus());
  }
  template <class T, class F>
  T reduce(const T& x, const F& combine) const {
    const auto all = of_block(x);
    T result = all[0];
    for (int thread = 1; thread < kThreads; ++thread) result = combine(result, all[size_t(thread)]);
    return result;
  }
  int before(int x, int& all) const {
    const auto each = of_block(x);
    int ahead = 0;
    all = 0;
    for (int thread = 0; thread < kThreads; ++thread) {
      if (thread < rank_) ahead += each[size_t(thread)];
      all += each[size_t(thread)];
    }
    return ahead;
  }
  int of_first(int x) const { return of_block(x)[0]; }

 private:
  template <class T>
  void write(const T& x) const {
    static_assert(sizeof(T) <= 16);
    std::memcpy(&block_.slots_[size_t(rank_)].bytes, &x, sizeof(T));
  }
  template <class T, size_t kCount>
  void read(int first, std::array<T, kCount>& all) const {
    for (size_t k = 0; k < kCount; ++k)
      std::memcpy(static_cast<void*>(&all[k]), &block_.slots_[size_t(first) + k].bytes, sizeof(T));
  }
  template <class T>
  std::array<T, kLanes> of_warp(const T& x) const {
    std::barrier<>& warp = *block_.warps_[size_t(this->warp())];
    write(x);
    warp.arrive_and_wait();
    std::array<T, kLanes> all;
    read(this->warp() * kLanes, all);
    warp.arrive_and_wait();  // all have read what the next call overwrites
    return all;
  }
  template <class T>
  std::array<T, kThreads> of_block(const T& x) const {
    sync();  // a warp that is ahead must not overwrite what another one exchanges
    write(x);
    sync();
    std::array<T, kThreads> all;
    read(0, all);
    sync();
    return all;
  }
  // As shuffles do, each with its opposite.
  template <class T, class F>
  static T folded(std::array<T, kLanes> all, int width, int first, const F& combine) {
    for (int half = width / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k)
        all[size_t(first + k)] = combine(all[size_t(first + k)], all[size_t(first + k + half)]);
    return all[size_t(first)];
  }

 public:
#else
  void sync() const {}
  template <class T, class F>
  T in_warp(const T& x, const F&) const {
    return x;
  }
  template <class F>
  void per_tile(const float (&x)[kLoads], const F& combine, float (&own)[kOwnTiles]) const {
    constexpr int kEach = kLoads / kTilesOfSpan;
    for (int tile = 0; tile < kTilesOfSpan; ++tile) {
      own[tile] = x[tile * kEach];
      for (int u = 1; u < kEach; ++u) own[tile] = combine(own[tile], x[tile * kEach + u]);
    }
  }
  int own_tile(int k) const { return k; }
  bool leads_tile() const { return true; }
  template <class F>
  uint32_t bits(const F& f) const {
    uint32_t word = 0;
    for (int bit = 0; bit < 32; ++bit) word |= uint32_t(f(bit)) << bit;
    return word;
  }
  template <class T, class F>
  T reduce(const T& x, const F&) const {
    return x;
  }
  int before(int x, int& all) const {
    all = x;
    return 0;
  }
  int of_first(int x) const { return x; }
#endif

  Arrived first_in_warp(const Arrived& mine) const { return in_warp(mine, Earlier()); }
  bool any(bool x) const { return reduce(int(x), Larger()) != 0; }
  int count(bool x) const { return reduce(int(x), Plus()); }

 private:
  Block& block_;
  const int rank_;
};

}  // namespace specdec::cuda
