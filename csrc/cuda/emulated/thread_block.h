// Blocks on a CPU: of one thread, which is quick; or of SPECDEC_EMULATED_THREADS real threads that wait for each other
// where those of a block do, so that a thread sanitizer finds where one does not wait.
#pragma once

#include <array>
#include <atomic>
#include <barrier>
#include <thread>

namespace specdec::cuda {

template <class T>
T fresh(const T* p) {
  return *p;
}
template <class T>
T streamed(const T* p) {
  return *p;
}
template <class T>
T uniform_value(const T& x) {
  return x;
}
template <class T>
void put(T* p, const T& x) {
  *p = x;
}
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
  struct Warp {
    std::barrier<> all{kLanes};
    struct alignas(16) {
      unsigned char bytes[16];
    } slots[2][kLanes]{};
  };
  std::barrier<> all{kThreads};
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
  if constexpr (kThreads > 1) current.block->all.arrive_and_wait();
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
  warp.all.arrive_and_wait();
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
