// Masks of trees of drafts, and moving the keys and values of accepted nodes: what backends in C++ take, on raw
// pointers; see specdec_kernels/ops/trees.py and kv.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops.h"

namespace specdec {

// The numbers are those of specdec_kernels/contract.py.
enum class MaskFormat { packed = 0, dense = 1, flat = 2, flat_bits = 3 };

// What one element of the mask is written as.
enum class MaskElement { byte, word16, word32, bool8, f32, bf16, f16 };

struct TreeMask {
  int64_t batch, nodes;
  int64_t capacity;             // elements of `out` a request: as many as it may need
  const int64_t* parents;       // [B, N]
  const int64_t* context_lens;  // [B], or null
  MaskFormat format;
  MaskElement element;
  void* out;
};

// An element of a mask is written as a word: f(word of its width).
template <class F>
auto with_word(MaskElement element, const F& f) {
  const auto is = [&](auto... any) { return ((element == any) || ...); };
  if (is(MaskElement::word32, MaskElement::f32)) return f(uint32_t());
  if (is(MaskElement::word16, MaskElement::bf16, MaskElement::f16)) return f(uint16_t());
  return f(uint8_t());
}

// Which keys the nodes of a request attend to, `live` of them in its tree: those before the tree, ancestors, and
// themselves.
struct Attended {
  const TreeMask& op;
  const int64_t request, live;
  const int64_t length = op.context_lens ? op.context_lens[request] : 0;
  const int64_t* const parents = op.parents + request * op.nodes;

  // Bits of `count` keys, of one node.
  SPECDEC_SHARED uint32_t bits(int64_t node, int64_t first, int64_t count) const {
    const int64_t before = std::clamp<int64_t>(length - first, 0, count);
    uint32_t bits = before == 32 ? ~0u : (1u << before) - 1;
    for (bool more = before < count; more && length + node >= first; node = parents[node]) {
      if (length + node < first + count) bits |= 1u << (length + node - first);
      more = node > 0 && node < live;
    }
    return bits;
  }
  // Of rows that follow each other without a gap, the byte that begins there.
  SPECDEC_SHARED uint32_t byte_at(int64_t node, int64_t key, int64_t width) const {
    uint32_t all = 0;
    for (int64_t bit = 0, count; bit < 8 && node < op.nodes; bit += count, key = 0, ++node) {
      count = std::min(8 - bit, width - key);
      all |= bits(node, key, count) << bit;
    }
    return all;
  }
  // Elements of a flat mask that a request has.
  SPECDEC_SHARED int64_t flat_elements(int64_t other) const {
    const int64_t keys = op.nodes * (op.context_lens[other] + op.nodes);
    return op.format == MaskFormat::flat ? keys : (keys + 7) / 8;
  }
  // What is written where a node does not attend: minus infinity if the mask is added to scores.
  SPECDEC_SHARED uint32_t no() const {
    const MaskElement element = op.element;
    return element == MaskElement::f32    ? 0xFF800000u
           : element == MaskElement::bf16 ? 0xFF80u
           : element == MaskElement::f16  ? 0xFC00u
                                          : 0;
  }
};

struct CompactKv {
  int64_t batch, nodes;       // of a tree, N
  int64_t heads, row_bytes;   // what a token has in one cache: `heads` rows of so many bytes
  int64_t head_stride;        // in bytes, as all strides here
  int64_t token_stride;       // between tokens of a request, or of a page
  int64_t outer_stride;       // between requests, or pages
  int64_t tokens;             // there is room for, of a request
  int64_t outer;              // requests, or pages, that a cache has
  const int64_t* path;        // [B, N]
  const int64_t* start;       // [B]
  const int64_t* page_table;  // [B, pages_a_request], or null
  int64_t pages_a_request, page_size;
};

// Where a token of a request lies in a cache, in bytes; -1 outside of it.
SPECDEC_SHARED static inline int64_t kv_offset(const CompactKv& op, int64_t request, int64_t token) {
  if (token < 0 || token >= op.tokens) return -1;
  if (op.page_table == nullptr) return request * op.outer_stride + token * op.token_stride;
  const int64_t page = op.page_table[request * op.pages_a_request + token / op.page_size];
  if (page < 0 || page >= op.outer) return -1;
  return page * op.outer_stride + token % op.page_size * op.token_stride;
}

// move(from, to) for the tokens along a path that move. A node never moves back past its place, so in ascending order
// nothing is overwritten before it has moved.
template <class F>
SPECDEC_SHARED void along_path(const CompactKv& op, int64_t request, const F& move) {
  const int64_t* const path = op.path + request * op.nodes;
  const int64_t start = op.start[request];
  for (int64_t i = 0; i < op.nodes && path[i] >= 0; ++i) {
    if (path[i] == i) continue;
    const int64_t from = kv_offset(op, request, start + path[i]), to = kv_offset(op, request, start + i);
    if (from >= 0 && to >= 0) move(from, to);
  }
}

}  // namespace specdec
