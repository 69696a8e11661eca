// Masks of trees, and keys and values that move.
#include "../common/trees.h"
#include "start.h"

namespace specdec::cuda {
namespace {

// Which keys a node of a request attends to, as an element of a mask: T is what that is written as.
template <class T>
struct MaskRow {
  const TreeMask& op;
  const int64_t request, length = op.context_lens ? op.context_lens[request] : 0;
  const int64_t* const parents = op.parents + request * op.nodes;
  const int live = live_nodes(parents, int(op.nodes));

  // Bits of `count` keys, of one node: of those before the tree, its ancestors, and itself.
  SPECDEC_DEVICE uint32_t attended(int64_t node, int64_t first, int64_t count) const {
    const int64_t before = std::clamp<int64_t>(length - first, 0, count);
    uint32_t bits = before == 32 ? ~0u : (1u << before) - 1;
    for (bool more = before < count; more && length + node >= first; node = parents[node]) {
      if (length + node < first + count) bits |= 1u << (length + node - first);
      more = node > 0 && node < live;
    }
    return bits;
  }
  // Of rows that follow each other without a gap, a byte.
  SPECDEC_DEVICE uint32_t byte_of(int64_t byte, int64_t width) const {
    uint32_t bits = 0;
    int64_t node = byte * 8 / width, key = byte * 8 % width;
    for (int64_t bit = 0, count; bit < 8 && node < op.nodes; bit += count, key = 0, ++node) {
      count = std::min(8 - bit, width - key);
      bits |= attended(node, key, count) << bit;
    }
    return bits;
  }
  // Elements of a flat mask that a request with such a context has.
  SPECDEC_DEVICE int64_t flat_elements(int64_t context) const {
    const int64_t keys = op.nodes * (context + op.nodes);
    return op.format == MaskFormat::flat ? keys : (keys + 7) / 8;
  }
};

// A row of the mask by a warp; but rows of bits that begin anywhere in a byte by all warps of the request together.
template <class T>
SPECDEC_KERNEL void tree_mask_kernel(SPECDEC_PARAMETER TreeMask op) {
  const int64_t row = block_index() * kWarps + block::warp(), lane = block::lane(), all = op.batch * op.room;
  if (row >= op.batch * op.nodes) return;
  const MaskRow<T> mask{op, row / op.nodes};
  const int64_t node = row % op.nodes;
  int64_t width = op.room / op.nodes, begin = mask.request * op.room, used = all;
  if (op.format == MaskFormat::flat || op.format == MaskFormat::flat_bits) {  // each request behind the others
    width = mask.length + op.nodes, begin = used = 0;
    for (int64_t b = lane; b < op.batch; b += kLanes) {
      const int64_t count = mask.flat_elements(op.context_lens[b]);
      begin += b < mask.request ? count : 0, used += count;
    }
    begin = block::in_warp(begin, std::plus<>()), used = block::in_warp(used, std::plus<>());
  }
  T* const out = static_cast<T*>(op.out);
  // Where a node does not attend: minus infinity if the mask is added to scores.
  const T no = T(op.element == MaskElement::f32    ? 0xFF800000u
                 : op.element == MaskElement::bf16 ? 0xFF80u
                 : op.element == MaskElement::f16  ? 0xFC00u
                                                   : 0);
  const int64_t keys = op.format == MaskFormat::packed ? 8 * int64_t(sizeof(T)) : 1;
  if (op.format == MaskFormat::flat_bits)
    for (int64_t i = node * kLanes + lane; i < mask.flat_elements(mask.length); i += op.nodes * kLanes)
      out[begin + i] = T(mask.byte_of(i, width));
  else
    for (int64_t i = lane; i < width; i += kLanes) {
      const uint32_t bits = mask.attended(node, i * keys, keys);
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

// One thread moves the same bytes of the rows of one head along the path. A node never moves to a later slot, so in
// ascending order nothing is overwritten before it has moved, and no thread waits for another.
template <class T>
SPECDEC_KERNEL void compact_kv_kernel(SPECDEC_PARAMETER CompactKv op, SPECDEC_PARAMETER Caches caches, int64_t count) {
  const int64_t index = block_index() * kThreads + block::rank(), columns = op.row_bytes / int64_t(sizeof(T));
  const int64_t column = index % columns, head = index / columns % op.heads;
  const int64_t request = index / columns / op.heads % op.batch, cache = index / columns / op.heads / op.batch;
  if (cache >= count) return;
  char* const own = caches.data[cache] + head * op.head_stride + column * int64_t(sizeof(T));
  const int64_t* const path = op.path + request * op.nodes;
  const int64_t start = op.start[request];
  for (int64_t i = 0; i < op.nodes && path[i] >= 0; ++i) {
    if (path[i] == i) continue;
    const int64_t from = kv_offset(op, request, start + path[i]), to = kv_offset(op, request, start + i);
    if (from < 0 || to < 0) continue;
    const T moved = *reinterpret_cast<const T*>(own + from);
    *reinterpret_cast<T*>(own + to) = moved;
  }
}

}  // namespace

cudaError_t launch(const TreeMask& op, cudaStream_t stream) {
  const auto written_as = [&](auto word) {
    const int64_t blocks = (op.batch * op.nodes + kWarps - 1) / kWarps;
    return launch_kernel(tree_mask_kernel<decltype(word)>, blocks, false, stream, op);
  };
  switch (op.element) {
    case MaskElement::f32:
    case MaskElement::word32: return written_as(uint32_t());
    case MaskElement::word16:
    case MaskElement::bf16:
    case MaskElement::f16: return written_as(uint16_t());
    default: return written_as(uint8_t());
  }
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
