#include <cstring>

#include "tree.h"

namespace specdec {

void compact_kv(const CompactKv& op, char* cache, int64_t request) {
  const int64_t* path = op.path + request * op.nodes;
  const int64_t start = op.start[request];
  // A node never moves back past its place, so in ascending order nothing is overwritten before it has moved.
  for (int64_t i = 0; i < op.nodes && path[i] >= 0; ++i) {
    if (path[i] == i) continue;
    const int64_t from = kv_offset(op, request, start + path[i]), to = kv_offset(op, request, start + i);
    if (from < 0 || to < 0) continue;
    for (int64_t h = 0; h < op.heads; ++h)
      std::memcpy(cache + to + h * op.head_stride, cache + from + h * op.head_stride, size_t(op.row_bytes));
  }
}

}  // namespace specdec
