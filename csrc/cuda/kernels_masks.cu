// Masks of trees, and keys and values that move.
#include "../common/trees.h"
#include "start.h"

namespace specdec::cuda {
namespace {

// A row of the mask by a warp; but rows of bits that begin anywhere in a byte by all warps of the request together.
template <class T>
SPECDEC_KERNEL void tree_mask_kernel(SPECDEC_PARAMETER TreeMask op) {
  const int64_t row = block_index() * kWarps + block::warp(), lane = block::lane(), all = op.batch * op.capacity;
  if (row >= op.batch * op.nodes) return;
  const int64_t request = row / op.nodes, node = row % op.nodes;
  const Attended mask{op, request, live_nodes(op.parents + request * op.nodes, int(op.nodes))};
  int64_t width = op.capacity / op.nodes, begin = request * op.capacity, used = all;
  if (op.format == MaskFormat::flat || op.format == MaskFormat::flat_bits) {  // each request behind the others
    width = mask.length + op.nodes, begin = used = 0;
    for (int64_t b = lane; b < op.batch; b += kLanes) {
      const int64_t count = mask.flat_elements(b);
      begin += b < request ? count : 0, used += count;
    }
    begin = block::in_warp(begin, std::plus<>()), used = block::in_warp(used, std::plus<>());
  }
  T* const out = static_cast<T*>(op.out);
  const T no = T(mask.no());
  const int64_t keys = op.format == MaskFormat::packed ? 8 * int64_t(sizeof(T)) : 1;
  if (op.format == MaskFormat::flat_bits)
    for (int64_t i = node * kLanes + lane; i < mask.flat_elements(request); i += op.nodes * kLanes)
      out[begin + i] = T(mask.byte_at(i * 8 / width, i * 8 % width, width));
  else
    for (int64_t i = lane; i < width; i += kLanes) {
      const uint32_t bits = mask.bits(node, i * keys, keys);
      out[begin + node * width + i] = keys > 1 ? T(bits) : bits != 0 ? T(no == 0) : no;
    }
  // What no request uses is 0.
  for (int64_t i = used + row * kLanes + lane; i < all; i += op.batch * op.nodes * kLanes) out[i] = 0;
}

// Caches of one launch: their addresses go with it, so that nothing is copied to the device before.
constexpr int kCachesALaunch = 256;
struct Caches {
  char* data[kCachesALaunch];
};

// One thread moves the same bytes of the rows of one head along the path, so that none waits for another.
template <class T>
SPECDEC_KERNEL void compact_kv_kernel(SPECDEC_PARAMETER CompactKv op, SPECDEC_PARAMETER Caches caches, int64_t count) {
  const int64_t index = block_index() * kThreads + block::rank(), columns = op.row_bytes / int64_t(sizeof(T));
  const int64_t column = index % columns, head = index / columns % op.heads;
  const int64_t request = index / columns / op.heads % op.batch, cache = index / columns / op.heads / op.batch;
  if (cache >= count) return;
  char* const own = caches.data[cache] + head * op.head_stride + column * int64_t(sizeof(T));
  along_path(op, request, [&](int64_t from, int64_t to) {
    const T moved = *reinterpret_cast<const T*>(own + from);
    *reinterpret_cast<T*>(own + to) = moved;
  });
}

}  // namespace

cudaError_t launch(const TreeMask& op, cudaStream_t stream) {
  const int64_t blocks = (op.batch * op.nodes + kWarps - 1) / kWarps;
  return with_word(op.element, [&](auto word) {
    return launch_kernel(tree_mask_kernel<decltype(word)>, blocks, false, stream, op);
  });
}

// By the widest type that divides all that an address is made of.
cudaError_t launch(const CompactKv& op, const std::vector<char*>& data, cudaStream_t stream) {
  const auto count = int64_t(data.size());
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < count && error == cudaSuccess; first += kCachesALaunch) {
    const int64_t some = std::min<int64_t>(kCachesALaunch, count - first);
    Caches caches{};
    uint64_t all = uint64_t(op.row_bytes | op.head_stride | op.token_stride | op.outer_stride);
    for (int64_t i = 0; i < some; ++i) all |= reinterpret_cast<uintptr_t>(caches.data[i] = data[size_t(first + i)]);
    const auto moved_by = [&](auto word) {
      const int64_t threads = op.row_bytes / int64_t(sizeof word) * op.heads * op.batch * some;
      const int64_t blocks = (threads + kThreads - 1) / kThreads;
      return launch_kernel(compact_kv_kernel<decltype(word)>, blocks, false, stream, op, caches, some);
    };
    error = all % 16 == 0  ? moved_by(Four())
            : all % 8 == 0 ? moved_by(uint64_t())
            : all % 4 == 0 ? moved_by(uint32_t())
            : all % 2 == 0 ? moved_by(uint16_t())
                           : moved_by(uint8_t());
  }
  return error;
}

}  // namespace specdec::cuda
