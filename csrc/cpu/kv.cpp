#include <cstring>

#include "tree.h"

namespace specdec {
namespace {

char* token_at(const CompactKv& op, char* cache, int64_t request, int64_t token) {
  if (op.page_table == nullptr) return cache + request * op.outer_stride + token * op.token_stride;
  const int64_t page = op.page_table[request * op.pages_a_request + token / op.page_size];
  return cache + page * op.outer_stride + token % op.page_size * op.token_stride;
}

}  // namespace

void compact_kv(const CompactKv& op, char* cache, int64_t request) {
  const int64_t* path = op.path + request * op.nodes;
  const int64_t start = op.start[request];
  // A node never moves back past its place, so in ascending order nothing is overwritten before it has moved.
  for (int64_t i = 0; i < op.nodes && path[i] >= 0; ++i) {
    if (path[i] == i) continue;
    const char* from = token_at(op, cache, request, start + path[i]);
    char* to = token_at(op, cache, request, start + i);
    for (int64_t h = 0; h < op.heads; ++h)
      std::memcpy(to + h * op.head_stride, from + h * op.head_stride, size_t(op.row_bytes));
  }
}

}  // namespace specdec
