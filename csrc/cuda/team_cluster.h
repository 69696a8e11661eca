// A team of several blocks: a cluster, whose blocks read each other's shared memory (compute capability 9.0 and up).
#pragma once

#include <cooperative_groups.h>

#include "launch.h"

namespace specdec::cuda {

constexpr int kBlockGroups = kThreads / kGroup;

class ClusterTeam {
 public:
  static constexpr bool kHolds = true;

  __device__ ClusterTeam() : cluster_(cooperative_groups::this_cluster()), held_(dynamic_memory()) {}

  __device__ int rank() const { return int(cluster_.block_rank()) * kThreads + int(threadIdx.x); }
  __device__ int size() const { return kClusterBlocks * kThreads; }
  __device__ void sync() const { cluster_.sync(); }

  template <class T, class F>
  __device__ T in_group(T x, const F& combine) const {
    return shuffle_reduce<kGroup>(x, combine);
  }
  __device__ bool any_in_warp(bool x) const { return __any_sync(~0u, x) != 0; }

  // Over all blocks, known to all. A result may be read until the call after the next: there are two places for them,
  // so that one wait for the cluster is enough.
  template <class T, class F>
  __device__ T reduce(T x, const F& combine) const {
    __shared__ alignas(16) unsigned char scratch[kThreads / 32 * 16];
    __shared__ alignas(16) unsigned char exchange[2][16];
    static_assert(sizeof(T) <= 16);
    x = shuffle_reduce<32>(x, combine);
    T* shared = reinterpret_cast<T*>(scratch);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    T* own = reinterpret_cast<T*>(exchange[turn_]);
    if (threadIdx.x == 0) {
      x = shared[0];
      for (int warp = 1; warp < kThreads / 32; ++warp) x = combine(x, shared[warp]);
      *own = x;
    }
    sync();
    x = *cluster_.map_shared_rank(own, 0);
    for (int block = 1; block < kClusterBlocks; ++block) x = combine(x, *cluster_.map_shared_rank(own, block));
    turn_ ^= 1;
    return x;
  }

  // What a row takes of each block's memory.
  __device__ static int64_t row_floats(int64_t vocab) { return held_floats(vocab); }

  // Puts logits of a row where all blocks can read them, once they have waited for each other: in the dynamic shared
  // memory, which is at the same place in every block; `room` floats of it are another row's.
  __device__ void keep(int64_t room, int64_t first, const float (&x)[kElements]) const {
    const HeldPlace place = held_place(first, kClusterBlocks, kBlockGroups);
    float4* to = reinterpret_cast<float4*>(held_ + room + place.offset);
    to[0] = {x[0], x[1], x[2], x[3]};
    to[1] = {x[4], x[5], x[6], x[7]};
  }
  __device__ void recall(int64_t room, int64_t first, float (&x)[kElements]) const {
    const HeldPlace place = held_place(first, kClusterBlocks, kBlockGroups);
    const float4* from =
        reinterpret_cast<const float4*>(cluster_.map_shared_rank(held_, unsigned(place.block)) + room + place.offset);
    const float4 low = from[0], high = from[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  __device__ float recall(int64_t room, int64_t id) const {
    const HeldPlace place = held_place(id, kClusterBlocks, kBlockGroups);
    return cluster_.map_shared_rank(held_, unsigned(place.block))[room + place.offset];
  }

 private:
  __device__ static float* dynamic_memory() {
    extern __shared__ __align__(16) float held[];
    return held;
  }

  cooperative_groups::cluster_group cluster_;
  float* held_;
  mutable int turn_ = 0;
};
using Team = ClusterTeam;

}  // namespace specdec::cuda
