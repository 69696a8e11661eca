// The threads that run a program together: a block on a GPU; where tests run the same text on a CPU, see
// team_emulated.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/ops.h"

// SPECDEC_PASS is for what goes over a whole row: a call costs nothing there, and one copy of it compiles faster.
#ifdef __CUDACC__
#define SPECDEC_DEVICE __device__ __forceinline__
#define SPECDEC_PASS __device__ __noinline__
#define SPECDEC_UNROLL _Pragma("unroll")
#else
#define SPECDEC_DEVICE inline
#define SPECDEC_PASS inline
#define SPECDEC_UNROLL
#endif

namespace specdec::cuda {

struct Smaller {
  template <class T>
  SPECDEC_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class T>
  SPECDEC_DEVICE T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Plus {
  template <class T>
  SPECDEC_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

}  // namespace specdec::cuda

#ifdef __CUDACC__

namespace specdec::cuda {

// Neighbouring ids that one thread holds: 16 bytes of bfloat16.
constexpr int kElements = 8;
// Threads that hold one tile between them.
constexpr int kGroup = kTile / kElements;

template <class T>
__device__ __forceinline__ T shuffled(const T& x, int mask) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(~0u, word, mask);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// The order does not depend on the thread, nor does the result.
template <int kWidth, class T, class F>
__device__ __forceinline__ T shuffle_reduce(T x, const F& combine) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) x = combine(x, shuffled(x, mask));
  return x;
}

// What other blocks wrote: not from this multiprocessor's own cache.
template <class T>
__device__ __forceinline__ T fresh(const T* place) {
  return __ldcg(place);
}

class Team {
 public:
  __device__ int rank() const { return int(threadIdx.x); }
  __device__ int size() const { return int(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }

  // Over the threads of a tile, known to all of them.
  template <class T, class F>
  __device__ T in_group(T x, const F& combine) const {
    return shuffle_reduce<kGroup>(x, combine);
  }

  // Whether it holds for a thread of the groups that shuffle together.
  __device__ bool any_in_warp(bool x) const { return __any_sync(~0u, x) != 0; }

  // Over the whole team, known to all.
  template <class T, class F>
  __device__ T reduce(T x, const F& combine) const {
    __shared__ alignas(16) unsigned char scratch[32 * 16];
    static_assert(sizeof(T) <= 16);
    T* shared = reinterpret_cast<T*>(scratch);
    x = shuffle_reduce<32>(x, combine);
    sync();  // an earlier result may still be read
    if (rank() % 32 == 0) shared[rank() / 32] = x;
    sync();
    x = shared[0];
    for (int warp = 1; warp < size() / 32; ++warp) x = combine(x, shared[warp]);
    return x;
  }

  // Whether this team is the last of `others` + 1 to come here; it sees what all of them wrote before.
  __device__ bool last_to_arrive(int32_t* counter, int32_t others) const {
    sync();  // all have written
    int32_t before = 0;
    if (rank() == 0) {
      __threadfence();
      before = atomicAdd(counter, 1);
      __threadfence();
    }
    return reduce(before, Larger()) == others;
  }

  __device__ void raise(int32_t* value, int32_t least) const {
    if (rank() == 0) atomicMax(value, least);
  }
};

}  // namespace specdec::cuda

#else
#include "team_emulated.h"
#endif

namespace specdec::cuda {

// f(tile, whether there is one) on the tiles [begin, end), one a group; all threads come equally often. Unrolled where
// a row is only read, so that a thread asks for the next tiles before the first is there.
template <int kAhead, class F>
SPECDEC_DEVICE void for_tiles(const Team& team, int64_t begin, int64_t end, const F& f) {
  const int64_t group = team.rank() / kGroup, groups = team.size() / kGroup;
#ifdef __CUDACC__
#pragma unroll kAhead
#endif
  for (int64_t tile = begin; tile < end; tile += groups) f(tile + group, tile + group < end);
}

// The first id of a tile that this thread holds.
SPECDEC_DEVICE int64_t own_ids(const Team& team, int64_t tile) {
  return tile * kTile + team.rank() % kGroup * kElements;
}

}  // namespace specdec::cuda
