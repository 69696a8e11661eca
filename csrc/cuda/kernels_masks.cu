// The kernels of masks.h.
#include <algorithm>

#include "launch.h"
#include "masks.h"

namespace specdec::cuda {
namespace {

template <class Program>
__global__ void __launch_bounds__(kThreads, 1)
    tree_mask_kernel(const __grid_constant__ TreeMask op, int64_t programs_a_request) {
  const Team team;
  Program(team, op, blockIdx.x, programs_a_request).run();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    compact_kv_kernel(const __grid_constant__ CompactKv op, const __grid_constant__ Caches caches, int64_t count) {
  compact_kv_program<T>(op, caches, count, int64_t(blockIdx.x) * blockDim.x + threadIdx.x);
}

template <class T>
int move(const CompactKv& op, const Caches& caches, int64_t count, void* stream) {
  const int64_t threads = op.row_bytes / int64_t(sizeof(T)) * op.heads * op.batch * count;
  const auto blocks = unsigned((threads + kThreads - 1) / kThreads);
  compact_kv_kernel<T><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, caches, count);
  return int(cudaGetLastError());
}

}  // namespace

int launch(const TreeMask& op, void* stream) {
  const int64_t programs = programs_a_request(op, kThreads);
  return with_program(op, [&](auto type) {
    const auto kernel = tree_mask_kernel<typename decltype(type)::type>;
    kernel<<<unsigned(op.batch * programs), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, programs);
    return int(cudaGetLastError());
  });
}

int launch(const CompactKv& op, char* const* data, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kCachesALaunch) {
    Caches caches{};
    const int64_t some = std::min<int64_t>(kCachesALaunch, count - first);
    std::copy_n(data + first, some, caches.data);
    if (const int error =
            with_kv_unit(op, caches, some, [&](auto unit) { return move<decltype(unit)>(op, caches, some, stream); }))
      return error;
  }
  return 0;
}

}  // namespace specdec::cuda
