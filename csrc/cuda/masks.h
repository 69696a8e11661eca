// Masks of trees, and keys and values that move: programs that write what they are asked for, 16 bytes a thread.
#pragma once

#include "../common/trees.h"
#include "team.h"

namespace specdec::cuda {

// What a thread writes at a time.
constexpr int kUnit = 16;
struct alignas(kUnit) Unit {
  uint32_t words[kUnit / 4];
};

// Whether node `query` has `node` among its ancestors or is it. Parents come before children, so a walk that has come
// to `node` or past it is over.
SPECDEC_DEVICE bool attends(const int64_t* parents, int64_t live, int64_t query, int64_t node) {
  if (query < live)
    while (query > node) query = parents[query];
  return query == node;
}

inline int64_t element_bytes(MaskElement element) {
  switch (element) {
    case MaskElement::f32:
    case MaskElement::word32: return 4;
    case MaskElement::word16:
    case MaskElement::bf16:
    case MaskElement::f16: return 2;
    default: return 1;
  }
}

// Teams that share the mask of a request: each thread writes a few units.
inline int64_t programs_a_request(const TreeMask& op, int64_t threads) {
  constexpr int64_t kUnitsAThread = 4;
  const int64_t units = op.room * element_bytes(op.element) / kUnit + 2;  // at both ends a part of one
  return (units + kUnitsAThread * threads - 1) / (kUnitsAThread * threads);
}

// The part of a mask that one request has: elements [begin, begin + count) of all.
struct MaskSpan {
  int64_t begin, count;
};
SPECDEC_DEVICE bool is_flat(const TreeMask& op) {
  return op.format == MaskFormat::flat || op.format == MaskFormat::flat_bits;
}
SPECDEC_DEVICE int64_t mask_count(const TreeMask& op, int64_t request) {
  if (!is_flat(op)) return op.room;
  const int64_t keys = op.nodes * (op.context_lens[request] + op.nodes);
  return op.format == MaskFormat::flat_bits ? (keys + 7) / 8 : keys;
}

// One team takes a part of one request's mask.
template <int kBytes>
class MaskProgram {
 public:
  SPECDEC_DEVICE MaskProgram(const Team& team, const TreeMask& op, int64_t program, int64_t programs_a_request)
      : team_(team),
        op_(op),
        request_(program / programs_a_request),
        part_(program % programs_a_request),
        parts_(programs_a_request),
        parents_(op.parents + request_ * op.nodes),
        length_(op.context_lens ? op.context_lens[request_] : 0) {
    width_ = op.format == MaskFormat::dense ? op.room / op.nodes : length_ + op.nodes;
  }

  SPECDEC_DEVICE void run() {
    live_ = live_nodes(team_, parents_, int(op_.nodes));
    const MaskSpan span = own_span();
    write(span.begin, span.begin + span.count, [&](int64_t first, auto& out) { fill(first - span.begin, out); });
    if (!is_flat(op_)) return;
    // What no request uses is 0; each clears its own room of it.
    int64_t used = 0;
    for (int64_t b = 0; b < op_.batch; ++b) used += mask_count(op_, b);
    const int64_t begin = request_ * op_.room, end = begin + op_.room;
    write(begin < used ? used : begin, end, [](int64_t, auto& out) {
      for (uint32_t& element : out) element = 0;
    });
  }

 private:
  static constexpr int kElementsAUnit = kUnit / kBytes;

  SPECDEC_DEVICE MaskSpan own_span() const {
    int64_t begin = 0;
    for (int64_t b = 0; b < request_; ++b) begin += mask_count(op_, b);
    return {begin, mask_count(op_, request_)};
  }

  // Elements [begin, end) of the whole mask, `value(first, out)` giving as many as `out` has: this part's units, which
  // lie at multiples of 16 bytes; those at the ends are shared with whoever is beside.
  template <class F>
  SPECDEC_DEVICE void write(int64_t begin, int64_t end, const F& value) const {
    if (begin >= end) return;
    unsigned char* const out = static_cast<unsigned char*>(op_.out);
    const int64_t first_unit = begin / kElementsAUnit, units = (end - 1) / kElementsAUnit + 1 - first_unit;
    for (int64_t u = part_ * team_.size() + team_.rank(); u < units; u += parts_ * team_.size()) {
      const int64_t at = (first_unit + u) * kElementsAUnit;
      const int64_t low = at < begin ? begin : at, high = at + kElementsAUnit < end ? at + kElementsAUnit : end;
      if (high - low == kElementsAUnit) {
        uint32_t values[kElementsAUnit];
        value(low, values);
        store_unit(out + at * kBytes, values);
      } else {
        for (int64_t i = low; i < high; ++i) {
          uint32_t one[1];
          value(i, one);
          memcpy(out + i * kBytes, one, kBytes);  // the low bytes
        }
      }
    }
  }

  SPECDEC_DEVICE static void store_unit(unsigned char* out, const uint32_t (&values)[kElementsAUnit]) {
    Unit unit{};
    SPECDEC_UNROLL
    for (int i = 0; i < kElementsAUnit; ++i) unit.words[i * kBytes / 4] |= values[i] << (i * kBytes % 4 * 8);
    *reinterpret_cast<Unit*>(out) = unit;
  }

  // The bits of elements of this request from `first` on.
  template <int kCount>
  SPECDEC_DEVICE void fill(int64_t first, uint32_t (&out)[kCount]) const {
    constexpr int64_t kBits = 8 * kBytes;
    const int64_t words = (op_.nodes + kBits - 1) / kBits;
    const uint32_t yes = yes_bits(), no = no_bits();
    int64_t query = first / width_, key = first % width_;
    SPECDEC_UNROLL
    for (int i = 0; i < kCount; ++i) {
      switch (op_.format) {
        case MaskFormat::packed: out[i] = packed_word(first + i, words); break;
        case MaskFormat::flat_bits: out[i] = packed_byte(first + i); break;
        default:
          out[i] = seen(query, key) ? yes : no;
          if (++key == width_) key = 0, ++query;
      }
    }
  }

  SPECDEC_DEVICE bool seen(int64_t query, int64_t key) const {
    const int64_t node = key - length_;
    return node < 0 || (node < op_.nodes && attends(parents_, live_, query, node));
  }

  // Word w of node i, from the walk up: bit j of it is node w * bits + j.
  SPECDEC_DEVICE uint32_t packed_word(int64_t index, int64_t words) const {
    constexpr int64_t kBits = 8 * kBytes;
    const int64_t node = index / words, first = index % words * kBits;
    uint32_t bits = 0;
    for (int64_t at = node; at >= first; at = at < live_ ? parents_[at] : -1)
      if (at < first + kBits) bits |= 1u << (at - first);
    return bits;
  }

  // Eight elements of rows of keys that follow each other without a gap.
  SPECDEC_DEVICE uint32_t packed_byte(int64_t index) const {
    uint32_t bits = 0;
    int64_t query = index * 8 / width_, key = index * 8 % width_;
    for (int bit = 0; bit < 8 && query < op_.nodes; ++bit) {
      bits |= uint32_t(seen(query, key)) << bit;
      if (++key == width_) key = 0, ++query;
    }
    return bits;
  }

  // Minus infinity, where the mask is added to scores.
  SPECDEC_DEVICE uint32_t no_bits() const {
    switch (op_.element) {
      case MaskElement::f32: return 0xFF800000u;
      case MaskElement::bf16: return 0xFF80u;
      case MaskElement::f16: return 0xFC00u;
      default: return 0;
    }
  }
  SPECDEC_DEVICE uint32_t yes_bits() const { return no_bits() == 0; }

  const Team& team_;
  const TreeMask& op_;
  const int64_t request_, part_, parts_;
  const int64_t* parents_;
  const int64_t length_;
  int64_t width_ = 0, live_ = 0;
};

// Calls f with the type of the program of a mask, by the size of its elements.
template <class F>
auto with_program(const TreeMask& op, const F& f) {
  switch (element_bytes(op.element)) {
    case 4: return f(TypeOf<MaskProgram<4>>());
    case 2: return f(TypeOf<MaskProgram<2>>());
    default: return f(TypeOf<MaskProgram<1>>());
  }
}

// --- keys and values ------------------------------------------------------------------------------------------------

// Caches of one launch: their addresses go with it, so that nothing is copied to the device before.
constexpr int kCachesALaunch = 256;
struct Caches {
  char* data[kCachesALaunch];
};

// One thread moves the same bytes of the rows of one head along the path. A node never moves back past its place, so in
// ascending order nothing is overwritten before it has moved, and no thread waits for another.
template <class T>
SPECDEC_DEVICE void compact_kv_program(const CompactKv& op, const Caches& caches, int64_t count, int64_t index) {
  const int64_t columns = op.row_bytes / int64_t(sizeof(T));
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

// Calls body(T{}) with the widest type that divides all that an address is made of.
template <class F>
auto with_kv_unit(const CompactKv& op, const Caches& caches, int64_t count, const F& body) {
  uint64_t all = uint64_t(op.row_bytes | op.head_stride | op.token_stride | op.outer_stride);
  for (int64_t i = 0; i < count; ++i) all |= reinterpret_cast<uintptr_t>(caches.data[i]);
  if (all % sizeof(Unit) == 0) return body(Unit{});
  if (all % 8 == 0) return body(uint64_t{});
  if (all % 4 == 0) return body(uint32_t{});
  if (all % 2 == 0) return body(uint16_t{});
  return body(uint8_t{});
}

}  // namespace specdec::cuda
