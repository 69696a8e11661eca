// Masks of trees of drafts, and moving the keys and values of accepted nodes: what backends in C++ take, on raw
// pointers; see specdec_kernels/ops/trees.py and kv.py.
#pragma once

#include <cstdint>

#include "ops.h"

namespace specdec {

// The numbers are those of specdec_kernels/contract.py.
enum class MaskFormat { packed = 0, dense = 1, flat = 2, flat_bits = 3 };

// What one element of the mask is written as.
enum class MaskElement { byte, word16, word32, bool8, f32, bf16, f16 };

struct TreeMask {
  int64_t batch, nodes;
  int64_t room;                 // elements of `out` a request: as many as it may need
  const int64_t* parents;       // [B, N]
  const int64_t* context_lens;  // [B], or null
  MaskFormat format;
  MaskElement element;
  void* out;
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

}  // namespace specdec
