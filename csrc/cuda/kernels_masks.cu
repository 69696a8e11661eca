// Masks of trees, and keys and values that move: kernels that write what is asked for, 16 bytes a thread.
#include "../common/trees.h"
#include "start.h"

namespace specdec::cuda {
namespace {

// What a thread writes at a time.
constexpr int kUnit = 16;
struct alignas(kUnit) Unit {
  uint32_t words[kUnit / 4];
};

// A part of one request's mask, by a block. Elements are of so many bytes, and have so many keys each; but the words of
// packed masks, which have a bit for each node.
template <int kBytes, int kKeys>
struct MaskProgram {
  const TreeMask& op;
  const int64_t blocks_each;
  const Team team{};
  const int64_t request = block_index() / blocks_each, threads = blocks_each * kThreads;
  const int64_t thread = block_index() % blocks_each * kThreads + Team::rank();
  const int64_t* const parents = op.parents + request * op.nodes;
  const int64_t live = live_nodes(team, parents, int(op.nodes));
  const bool flat = op.format == MaskFormat::flat || op.format == MaskFormat::flat_bits;  // each behind the others
  const int64_t length = op.context_lens ? op.context_lens[request] : 0;
  const int64_t width = flat ? length + op.nodes : op.room / op.nodes;
  static constexpr int kElementsAUnit = kUnit / kBytes;

  SPECDEC_DEVICE void run() const {
    int64_t begin = request * op.room, count = op.room, used = op.batch * op.room;
    if (flat) {
      used = 0;
      for (int64_t b = 0; b < op.batch; ++b) {
        const int64_t here = (op.nodes * (op.context_lens[b] + op.nodes) + kKeys - 1) / kKeys;
        if (b == request) begin = used, count = here;
        used += here;
      }
    }
    write(begin, begin + count, [&](int64_t first, auto& out) { fill(first - begin, out); });
    // What no request uses is 0; each clears its own part of it.
    write(Larger()(request * op.room, used), (request + 1) * op.room, [](int64_t, auto& out) {
      for (uint32_t& element : out) element = 0;
    });
  }

  // Elements [begin, end) of the whole mask, `value(first, out)` giving as many as `out` has: this block's units, which
  // lie at multiples of 16 bytes; those at the ends are shared with whoever is beside.
  template <class F>
  SPECDEC_DEVICE void write(int64_t begin, int64_t end, const F& value) const {
    if (begin >= end) return;
    unsigned char* const out = static_cast<unsigned char*>(op.out);
    const int64_t first_unit = begin / kElementsAUnit, units = (end - 1) / kElementsAUnit + 1 - first_unit;
    for (int64_t u = thread; u < units; u += threads) {
      const int64_t at = (first_unit + u) * kElementsAUnit;
      const int64_t low = Larger()(at, begin), high = Smaller()(at + kElementsAUnit, end);
      if (high - low == kElementsAUnit) {
        uint32_t values[kElementsAUnit];
        value(low, values);
        Unit unit{};
        SPECDEC_UNROLL
        for (int i = 0; i < kElementsAUnit; ++i) unit.words[i * kBytes / 4] |= values[i] << (i * kBytes % 4 * 8);
        *reinterpret_cast<Unit*>(out + at * kBytes) = unit;
      } else {
        for (int64_t i = low; i < high; ++i) {
          uint32_t one[1];
          value(i, one);
          memcpy(out + i * kBytes, one, kBytes);  // the low bytes
        }
      }
    }
  }

  // The bits of elements of this request from `first` on.
  template <int kCount>
  SPECDEC_DEVICE void fill(int64_t first, uint32_t (&out)[kCount]) const {
    // What is no key is minus infinity where the mask is added to scores.
    const uint32_t no = op.element == MaskElement::f32    ? 0xFF800000u
                        : op.element == MaskElement::bf16 ? 0xFF80u
                        : op.element == MaskElement::f16  ? 0xFC00u
                                                          : 0;
    int64_t query = first * kKeys / width, key = first * kKeys % width;
    SPECDEC_UNROLL
    for (uint32_t& element : out) {
      element = 0;
      SPECDEC_UNROLL
      for (int bit = 0; bit < kKeys; ++bit) {
        if (op.format == MaskFormat::packed)
          element = packed_word(query, key);
        else if (kKeys > 1)
          element |= uint32_t(attends(query, key)) << bit;
        else
          element = attends(query, key) ? no == 0 : no;
        if (++key == width) key = 0, ++query;
      }
    }
  }

  // Whether a node has a key before it, among its ancestors, or is it. Parents come before children, so a walk that has
  // come to the key's node or past it is over.
  SPECDEC_DEVICE bool attends(int64_t query, int64_t key) const {
    const int64_t node = key - length;
    if (kKeys > 1 && query >= op.nodes) return false;  // bits of the last byte
    if (node < 0) return true;
    if (query < live)
      while (query > node) query = parents[query];
    return query == node;
  }

  // Word w of a node, from the walk up: bit j of it is node w * bits + j.
  SPECDEC_DEVICE uint32_t packed_word(int64_t node, int64_t w) const {
    constexpr int64_t kBits = 8 * kBytes;
    const int64_t first = w * kBits;
    uint32_t bits = 0;
    for (; node >= first; node = node < live ? parents[node] : -1)
      if (node < first + kBits) bits |= 1u << (node - first);
    return bits;
  }
};

template <int kBytes, int kKeys = 1>
SPECDEC_KERNEL void tree_mask_kernel(SPECDEC_PARAMETER TreeMask op, int64_t blocks_each) {
  MaskProgram<kBytes, kKeys>{op, blocks_each}.run();
}

template <int kBytes, int kKeys = 1>
cudaError_t launch_mask(const TreeMask& op, cudaStream_t stream) {
  constexpr int64_t kUnitsAThread = 4;
  const int64_t units = op.room * kBytes / kUnit + 2;  // at both ends a part of one
  const int64_t each = (units + kUnitsAThread * kThreads - 1) / (kUnitsAThread * kThreads);
  return launch_kernel(tree_mask_kernel<kBytes, kKeys>, op.batch * each, false, stream, op, each);
}

// Caches of one launch: their addresses go with it, so that nothing is copied to the device before.
constexpr int kCachesALaunch = 256;
struct Caches {
  char* data[kCachesALaunch];
};

// One thread moves the same bytes of the rows of one head along the path. A node never moves back past its place, so in
// ascending order nothing is overwritten before it has moved, and no thread waits for another.
template <class T>
SPECDEC_KERNEL void compact_kv_kernel(SPECDEC_PARAMETER CompactKv op, SPECDEC_PARAMETER Caches caches, int64_t count) {
  const int64_t index = block_index() * kThreads + Team::rank(), columns = op.row_bytes / int64_t(sizeof(T));
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
  if (op.format == MaskFormat::flat_bits) return launch_mask<1, 8>(op, stream);
  switch (op.element) {
    case MaskElement::f32:
    case MaskElement::word32: return launch_mask<4>(op, stream);
    case MaskElement::word16:
    case MaskElement::bf16:
    case MaskElement::f16: return launch_mask<2>(op, stream);
    default: return launch_mask<1>(op, stream);
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
    error = all % sizeof(Unit) == 0 ? launch_moves<Unit>(op, caches, some, stream)
            : all % 8 == 0          ? launch_moves<uint64_t>(op, caches, some, stream)
            : all % 4 == 0          ? launch_moves<uint32_t>(op, caches, some, stream)
            : all % 2 == 0          ? launch_moves<uint16_t>(op, caches, some, stream)
                                    : launch_moves<uint8_t>(op, caches, some, stream);
  }
  return error;
}

}  // namespace specdec::cuda
