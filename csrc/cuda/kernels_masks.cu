// Masks of trees, and keys and values that move.
#include "../common/trees.h"
#include "start.h"

namespace specdec::cuda {
namespace {

// The row of a mask that says which keys a node attends to, by a warp. T: what an element is written as.
template <class T>
class MaskRow {
 public:
  SPECDEC_DEVICE MaskRow(const TreeMask& op, int64_t row)
      : op_(op),
        request_(row / op.nodes),
        query_(row % op.nodes),
        parents_(op.parents + request_ * op.nodes),
        live_(live_nodes(parents_, int(op.nodes))),
        length_(op.context_lens ? op.context_lens[request_] : 0) {}

  SPECDEC_DEVICE void write() const {
    const int64_t lane = block::lane(), row = request_ * op_.nodes + query_, all = op_.batch * op_.room;
    int64_t width = op_.room / op_.nodes, begin = request_ * op_.room, used = all;
    if (op_.format == MaskFormat::flat || op_.format == MaskFormat::flat_bits) {  // each behind the others
      width = length_ + op_.nodes, begin = used = 0;
      for (int64_t b = lane; b < op_.batch; b += kLanes) {
        const int64_t count = flat_elements(op_.context_lens[b] + op_.nodes);
        begin += b < request_ ? count : 0, used += count;
      }
      begin = block::in_warp(begin, std::plus<>()), used = block::in_warp(used, std::plus<>());
    }
    T* const out = static_cast<T*>(op_.out) + begin;
    if (op_.format == MaskFormat::packed)
      write_words(out + query_ * width, width);
    else if (op_.format != MaskFormat::flat_bits)
      write_keys(out + query_ * width, width);
    else  // rows begin anywhere in a byte: those of a request are shared by all of its warps
      for (int64_t byte = query_ * kLanes + lane; byte < flat_elements(width); byte += op_.nodes * kLanes)
        out[byte] = packed_byte(byte, width);
    // What no request uses is 0.
    for (int64_t i = used + row * kLanes + lane; i < all; i += op_.batch * op_.nodes * kLanes)
      static_cast<T*>(op_.out)[i] = 0;
  }

 private:
  SPECDEC_DEVICE int64_t flat_elements(int64_t width) const {
    return op_.format == MaskFormat::flat ? op_.nodes * width : (op_.nodes * width + 7) / 8;
  }

  SPECDEC_DEVICE void write_keys(T* out, int64_t width) const {
    // Where it does not attend, minus infinity if the mask is added to scores.
    const T no = T(op_.element == MaskElement::f32    ? 0xFF800000u
                   : op_.element == MaskElement::bf16 ? 0xFF80u
                   : op_.element == MaskElement::f16  ? 0xFC00u
                                                      : 0);
    for (int64_t key = block::lane(); key < width; key += kLanes) out[key] = attends(query_, key) ? T(no == 0) : no;
  }

  // A bit for each key; of a word of less than 32, the low ones.
  SPECDEC_DEVICE void write_words(T* out, int64_t width) const {
    for (int64_t word = 0; word < width; ++word) {
      const uint32_t bits = block::bits([&](int bit) { return attends(query_, word * 8 * int(sizeof(T)) + bit); });
      if (block::lane() == 0) out[word] = T(bits);
    }
  }

  // Whether a key is before the tree, among a node's ancestors, or the node. Parents come before children, so a walk
  // that has reached the key's node or passed it is over.
  SPECDEC_DEVICE bool attends(int64_t query, int64_t key) const {
    const int64_t node = key - length_;
    if (node < 0) return true;
    if (query < live_)
      while (query > node) query = parents_[query];
    return query == node;
  }

  // Eight keys of rows that follow each other without a gap.
  SPECDEC_DEVICE T packed_byte(int64_t byte, int64_t width) const {
    uint32_t bits = 0;
    int64_t query = byte * 8 / width, key = byte * 8 % width;
    for (int bit = 0; bit < 8 && query < op_.nodes; ++bit) {
      bits |= uint32_t(attends(query, key)) << bit;
      if (++key == width) key = 0, ++query;
    }
    return T(bits);
  }

  const TreeMask& op_;
  const int64_t request_, query_;
  const int64_t* const parents_;
  const int64_t live_, length_;
};

template <class T>
SPECDEC_KERNEL void tree_mask_kernel(SPECDEC_PARAMETER TreeMask op) {
  const int64_t row = block_index() * kWarps + block::warp();
  if (row < op.batch * op.nodes) MaskRow<T>(op, row).write();
}

template <class T>
cudaError_t launch_mask(const TreeMask& op, cudaStream_t stream) {
  return launch_kernel(tree_mask_kernel<T>, (op.batch * op.nodes + kWarps - 1) / kWarps, false, stream, op);
}

struct alignas(16) Bytes16 {
  uint64_t words[2];
};

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

template <class T>
cudaError_t launch_moves(const CompactKv& op, const Caches& caches, int64_t count, cudaStream_t stream) {
  const int64_t threads = op.row_bytes / int64_t(sizeof(T)) * op.heads * op.batch * count;
  return launch_kernel(compact_kv_kernel<T>, (threads + kThreads - 1) / kThreads, false, stream, op, caches, count);
}

}  // namespace

cudaError_t launch(const TreeMask& op, cudaStream_t stream) {
  switch (op.element) {
    case MaskElement::f32:
    case MaskElement::word32: return launch_mask<uint32_t>(op, stream);
    case MaskElement::word16:
    case MaskElement::bf16:
    case MaskElement::f16: return launch_mask<uint16_t>(op, stream);
    default: return launch_mask<uint8_t>(op, stream);
  }
}

// By the widest type that divides all that an address is made of.
cudaError_t launch(const CompactKv& op, char* const* data, int64_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < count && error == cudaSuccess; first += kCachesALaunch) {
    const int64_t some = std::min<int64_t>(kCachesALaunch, count - first);
    Caches caches{};
    uint64_t all = uint64_t(op.row_bytes | op.head_stride | op.token_stride | op.outer_stride);
    for (int64_t i = 0; i < some; ++i) all |= reinterpret_cast<uintptr_t>(caches.data[i] = data[first + i]);
    error = all % 16 == 0  ? launch_moves<Bytes16>(op, caches, some, stream)
            : all % 8 == 0 ? launch_moves<uint64_t>(op, caches, some, stream)
            : all % 4 == 0 ? launch_moves<uint32_t>(op, caches, some, stream)
            : all % 2 == 0 ? launch_moves<uint16_t>(op, caches, some, stream)
                           : launch_moves<uint8_t>(op, caches, some, stream);
  }
  return error;
}

}  // namespace specdec::cuda
