// Moving keys and values of accepted nodes into place; see specdec_kernels/ops/kv.py.
#pragma once

#include <cstdint>

namespace specdec {

struct CompactKv {
  int64_t batch, nodes;       // of a tree, N
  int64_t heads, row_bytes;   // what a token has in one cache: `heads` rows of so many bytes
  int64_t head_stride;        // in bytes, as all strides here
  int64_t token_stride;       // between tokens of a request, or of a page
  int64_t outer_stride;       // between requests, or pages
  const int64_t* path;        // [B, N]
  const int64_t* start;       // [B]
  const int64_t* page_table;  // [B, pages_a_request], or null
  int64_t pages_a_request, page_size;
};

// One request in one cache.
void compact_kv(const CompactKv&, char* cache, int64_t request);

}  // namespace specdec
