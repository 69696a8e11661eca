// The threads that run a program together: a block on a GPU. Where tests run the same text on a CPU, see
// emulated/thread_block.h.
//
// A row is measured in spans of 1,024 ids, each by one warp: a lane takes eight neighbouring ids at a time, which are
// 16 bytes of bfloat16, `kLoads` times. Half a warp takes a tile at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "launch.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// SPECDEC_ROLLED is for loops of few turns, which the compiler would unroll. SPECDEC_SELDOM is for what is called
// seldom, or goes over a whole row: a call costs nothing there, its registers are not those of what calls it, and one
// copy compiles faster. Arguments come by value, so that nothing of the caller has an address.
#ifdef __CUDACC__
#define SPECDEC_KERNEL __global__ __launch_bounds__(kThreads, kBlocksAProcessor)
#define SPECDEC_PARAMETER const __grid_constant__
#define SPECDEC_DEVICE __device__ __forceinline__
#define SPECDEC_SELDOM inline __device__ __noinline__
#define SPECDEC_UNROLL _Pragma("unroll")
#define SPECDEC_ROLLED _Pragma("unroll 1")
#else
#define SPECDEC_KERNEL inline
#define SPECDEC_PARAMETER const
#define SPECDEC_DEVICE inline
#define SPECDEC_SELDOM inline
#define SPECDEC_UNROLL
#define SPECDEC_ROLLED
#endif

namespace specdec::cuda {

#ifdef __CUDACC__
constexpr int kThreads = 256;
static_assert(kThreads == 32 * kChunkSpans);
#else
#ifndef SPECDEC_EMULATED_THREADS
#define SPECDEC_EMULATED_THREADS 1
#endif
constexpr int kThreads = SPECDEC_EMULATED_THREADS;
#endif
constexpr int kLanes = kThreads == 1 ? 1 : 32, kWarps = kThreads / kLanes;
constexpr int kTileIds = int(kTile), kSpan = int(kSpanIds), kTilesOfSpan = int(kSpanTiles);
// Neighbouring ids that a lane loads at a time, and how often it does in a span.
constexpr int kElements = 8, kLoads = kSpan / (kElements * kLanes);

SPECDEC_DEVICE float float_of_bits(int bits) { return std::bit_cast<float>(bits); }
SPECDEC_DEVICE int bits_of(float x) { return std::bit_cast<int>(x); }
// Not std::countr_zero, of which nvcc makes 32 for any number and says nothing: what it calls is the host's.
SPECDEC_DEVICE int trailing_zeros(uint32_t x) { return std::popcount(~x & (x - 1)); }

// The larger one; nan if either is: so the largest logit of a row says whether the row is valid.
struct LargerOrNan {
  SPECDEC_DEVICE float operator()(float a, float b) const {
#ifdef __CUDACC__
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
#else
    return a != a || b < a ? a : b;
#endif
  }
};

// Who comes first in a race; the lower id on ties. No id: nobody.
constexpr int kNobody = std::numeric_limits<int>::max();
struct Arrived {
  float time = INFINITY;
  int id = kNobody;
};
struct Earlier {
  SPECDEC_DEVICE Arrived operator()(const Arrived& a, const Arrived& b) const {
    return b.time < a.time || (b.time == a.time && b.id < a.id) ? b : a;
  }
};

constexpr float kLog2E = 1.4426950408889634f;

struct Sampling {
  float scale = 1.0f;  // inf: greedy
  int top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;

  SPECDEC_DEVICE bool greedy() const { return scale == INFINITY; }
  SPECDEC_DEVICE bool limits(int vocab) const { return top_k > 0 && top_k < vocab; }
  SPECDEC_DEVICE bool filters(int vocab) const { return limits(vocab) || top_p < 1.0f || min_p > 0.0f; }
  SPECDEC_DEVICE float scale2() const { return greedy() ? 1.0f : scale * kLog2E; }  // of base 2
};

// Rows of logits: how they lie in memory, and what is done to them as they are loaded (rows.h); what tokens are drawn
// by; and the tables that they are measured into.
struct Rows {
  Logits logits;  // of the request's first row
  Columns columns;
  const uint32_t* mask = nullptr;  // of the first row
  Adjustments adjustments;
  Ids drafts;  // row i counts those of its node's path as output
  int64_t first_draft = 0, draft_stride = 0;
  const int64_t* parents = nullptr;  // of a tree
  int vocab = 0, spans = 0;
  Sampling sampling;
  float* tables = nullptr;
  int64_t floats_a_table = 0;  // 0: one table serves all rows

  SPECDEC_DEVICE int64_t draft(int node) const { return drafts[first_draft + node * draft_stride]; }
};

// What a block has in its shared memory: while it looks for what filters keep (filters.h); and of a request what is
// done to the logits of its rows, which would take half the registers of every thread.
constexpr int kListed = 1024, kKept = 1024, kBounds = 512;
struct alignas(16) Four {
  float x[4];
};
using Eights = Four[2][kThreads];  // of each thread
enum Which { kTargetRows, kDraftRows, kRawRows };
struct BlockMemory {
  union {
    struct {
      int list[kListed];
      float values[kKept], weights[kKept];
    } found;
    Four bounds[kBounds];  // of tiles, for a draw (distribution.h)
    Eights aside;          // while more logits are processed (rows.h)
  };
  float top, sum;  // the largest logit of a row, and the sum of all weights relative to it
  Rows rows[3];
  Eights processed;                                // eight logits of each thread (rows.h)
  alignas(16) unsigned char request[352];          // what all its threads know of it (verify.h, cooperative.h)
  alignas(16) unsigned char scratch[16 * kWarps];  // of the functions of a block
};

// x by its words, each replaced by f(word, its number).
template <class Word, class T, class F>
SPECDEC_DEVICE T by_words(T x, const F& f) {
  static_assert(sizeof(T) % sizeof(Word) == 0);
  Word words[sizeof(T) / sizeof(Word)];
  memcpy(words, &x, sizeof(T));
  SPECDEC_UNROLL
  for (int k = 0; k < int(sizeof(T) / sizeof(Word)); ++k) words[k] = f(words[k], k);
  memcpy(&x, words, sizeof(T));
  return x;
}

}  // namespace specdec::cuda

#ifdef __CUDACC__

namespace specdec::cuda {

__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }

// What is read once.
template <class T>
__device__ __forceinline__ T load_streaming(const T* p) {
  return by_words<uint4>(T{}, [&](uint4, int k) { return __ldcs(reinterpret_cast<const uint4*>(p) + k); });
}
// What blocks of this launch wrote, and writing it. It is not read from this multiprocessor's own cache.
template <class T>
__device__ __forceinline__ T load_l2(const T* p) {
  if constexpr (sizeof(T) <= 8)
    return __ldcg(p);
  else
    return by_words<uint4>(T{}, [&](uint4, int k) { return __ldcg(reinterpret_cast<const uint4*>(p) + k); });
}
template <class T>
__device__ __forceinline__ void store_l2(T* p, const T& x) {
  if constexpr (sizeof(T) <= 8)
    __stcg(p, x);
  else
    by_words<uint4>(x, [&](uint4 word, int k) { return __stcg(reinterpret_cast<uint4*>(p) + k, word), word; });
}

// Within a few units in the last place, the logarithm up to a half.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float log_of_small(float x) { return __logf(x); }
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Counters of a launch, which return what they were before. Arriving at one releases what the block wrote; only who
// finds that it was the last acquires what the others did.
#define SPECDEC_ATOMIC(name, instruction)                                                     \
  __device__ __forceinline__ uint32_t name(uint32_t* word, uint32_t x) {                      \
    uint32_t before;                                                                          \
    asm volatile(instruction " %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(x) : "memory"); \
    return before;                                                                            \
  }
SPECDEC_ATOMIC(atomic_inc, "atom.release.gpu.global.inc.u32")  // 0 again after x
SPECDEC_ATOMIC(atomic_add, "atom.acq_rel.gpu.global.add.u32")
SPECDEC_ATOMIC(atomic_or, "atom.acq_rel.gpu.global.or.b32")
#undef SPECDEC_ATOMIC
__device__ __forceinline__ void fence_acquire(const uint32_t*) { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* word) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(word) : "memory");
  return x;
}

// An optimisation barrier: values derived from x are computed again at each use and not hoisted, which would cost
// registers.
__device__ __forceinline__ void compute_here(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void wait_a_little() { __nanosleep(20); }

// What all lanes of a warp have alike, so that it takes none of their registers.
template <class T>
__device__ __forceinline__ T uniform_value(T x) {
  return by_words<uint32_t>(x, [](uint32_t word, int) { return __reduce_or_sync(~0u, word); });
}

namespace block {

// Read anew each time, or what follows from it would be kept, and spilled, across passes over rows. The lane is kept:
// loops ask for it.
__device__ __forceinline__ int rank() {
  int own;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(own));
  return own;
}
__device__ __forceinline__ int lane() { return int(threadIdx.x % kLanes); }
__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ bool any(bool x) { return __syncthreads_or(x) != 0; }
__device__ __forceinline__ BlockMemory& memory() {
  __shared__ BlockMemory own;
  return own;
}
// What the lane has whose number differs in the bits of a mask.
template <class T>
__device__ __forceinline__ T shuffled(T x, int mask) {
  return by_words<uint32_t>(x, [&](uint32_t word, int) { return __shfl_xor_sync(~0u, word, mask); });
}

}  // namespace block

}  // namespace specdec::cuda

#else
#include "emulated/thread_block.h"
#endif

namespace specdec::cuda {

// x, as if it were not known where it comes from.
template <class T>
SPECDEC_DEVICE T opaque(const T& x) {
  return by_words<uint32_t>(x, [](uint32_t word, int) { return compute_here(word), word; });
}

// Of a block and its warps. All of their threads come, and all know the result.
namespace block {

SPECDEC_DEVICE int warp() { return rank() / kLanes; }

// The order does not depend on the lane, nor does the result.
template <class T, class F>
SPECDEC_DEVICE T in_warp(T x, const F& combine) {
  SPECDEC_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = combine(x, shuffled(x, mask));
  return x;
}

SPECDEC_DEVICE Arrived first_in_warp(const Arrived& mine) {
#ifdef __CUDACC__
  Arrived first;  // times are not negative: their bits are in their order
  first.time = __uint_as_float(__reduce_min_sync(~0u, __float_as_uint(mine.time)));
  first.id = int(__reduce_min_sync(~0u, mine.time == first.time ? unsigned(mine.id) : unsigned(kNobody)));
  return first;
#else
  return in_warp(mine, Earlier());
#endif
}

// The word of the bits f(0), ..., f(31).
template <class F>
SPECDEC_DEVICE uint32_t bits(const F& f) {
#ifdef __CUDACC__
  return __ballot_sync(~0u, f(lane()));
#else
  uint32_t word = 0;
  for (int bit = lane(); bit < 32; bit += kLanes) word |= uint32_t(f(bit)) << bit;
  return in_warp(word, std::plus<>());
#endif
}

// The first number from `begin` on of which f is true; `end` if there is none.
template <class F>
SPECDEC_DEVICE int first_where(int begin, int end, const F& f) {
  SPECDEC_ROLLED
  for (; begin < end; begin += 32) {
    const uint32_t hits = bits([&](int bit) { return begin + bit < end && f(begin + bit); });
    if (hits != 0) return begin + trailing_zeros(hits);
  }
  return end;
}

// Of what each lane has of the loads of a span, the results of its tiles: those of the four loads are combined
// together, so that it takes five shuffles and not sixteen. That of tile own_tile() is this lane's and three others',
// the first of which writes it. It is computed anew each time, or it and its bits would be kept across a kernel.
SPECDEC_DEVICE int own_tile() { return opaque((lane() >> 1 & 4) + (lane() >> 1 & 2) + (lane() >> 4)); }
template <class F>
SPECDEC_DEVICE void put_tiles(const float (&x)[4], int own_tile, const F& combine, float* own) {
  const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];                 // values to choose from, not memory
  const bool upper8 = (own_tile & 4) != 0, upper4 = (own_tile & 2) != 0;  // bits 8 and 4 of the lane
  const float low = combine(upper8 ? x2 : x0, shuffled(upper8 ? x0 : x2, 8));
  const float high = combine(upper8 ? x3 : x1, shuffled(upper8 ? x1 : x3, 8));
  float mine = combine(upper4 ? high : low, shuffled(upper4 ? low : high, 4));
  mine = combine(mine, shuffled(mine, 2));
  mine = combine(mine, shuffled(mine, 1));
  if (lane() % 4 == 0) store_l2(own, mine);
}

// What the first lane of each warp has, known to all, in the block's memory until this is called again.
template <class T>
SPECDEC_DEVICE const T* of_warps(const T& x) {
  static_assert(sizeof(T) <= 16);
  T* const shared = reinterpret_cast<T*>(memory().scratch);
  sync();  // an earlier result may still be read
  if (lane() == 0) shared[warp()] = x;
  sync();
  return shared;
}

// f() by one thread, behind what all did, who see what it changed.
template <class F>
SPECDEC_DEVICE void by_one(const F& f) {
  sync();  // all have read what is overwritten now
  if (rank() == 0) f();
  sync();
}

// Over the whole block.
template <class T, class F>
SPECDEC_DEVICE T reduce(T x, const F& combine) {
  const T* const each = of_warps(in_warp(x, combine));
  x = each[0];
  SPECDEC_UNROLL
  for (int other = 1; other < kWarps; ++other) x = combine(x, each[other]);
  return opaque(x);  // or the values of all warps would stay in registers
}

// The sum of `x` over the threads before this one; and over all.
SPECDEC_DEVICE int before(int x, int& all) {
  int sum = x, ahead = 0;
  SPECDEC_UNROLL
  for (int mask = 1; mask < kLanes; mask *= 2) {
    const int other = shuffled(sum, mask);
    ahead += (lane() & mask) != 0 ? other : 0, sum += other;
  }
  const int* const each = of_warps(sum);
  all = 0;
  SPECDEC_UNROLL
  for (int other = 0; other < kWarps; ++other) {
    if (other < warp()) ahead += each[other];
    all += each[other];
  }
  return ahead;
}

}  // namespace block

// Whether this block is the last of so many to arrive at a counter, which is 0 again then. The last one sees what all
// of them wrote before.
SPECDEC_DEVICE bool comes_last(uint32_t* counter, int blocks) {
  block::sync();  // all threads have written
  const bool last = block::rank() == 0 && atomic_inc(counter, uint32_t(blocks - 1)) == uint32_t(blocks - 1);
  if (last) fence_acquire(counter);
  return block::any(last);
}

// Nodes of a tree before the first one without a parent among the earlier.
SPECDEC_DEVICE int live_nodes(const int64_t* parents, int nodes) {
  return block::first_where(0, nodes, [&](int node) {
    const int64_t up = given(parents + node);
    return node == 0 ? up != -1 : up < 0 || up >= node;
  });
}

// Where the u-th load of a lane begins in a span.
SPECDEC_DEVICE int load_offset(int u) { return (u * kLanes + block::lane()) * kElements; }

}  // namespace specdec::cuda
