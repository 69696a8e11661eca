// Attention masks of trees of drafts, and moving keys and values of accepted nodes into place.
#include <algorithm>
#include <cstring>

#include "verify.h"

namespace specdec {
namespace {

template <class T>
void write_mask(const Attended& mask) {
  const TreeMask& op = mask.op;
  const bool bits = op.format == MaskFormat::flat_bits, flat = bits || op.format == MaskFormat::flat;
  int64_t begin = 0;  // flat requests follow each other
  for (int64_t b = 0; flat && b < mask.request; ++b) begin += mask.flat_elements(b);
  T* const out = static_cast<T*>(op.out) + (flat ? begin : mask.request * op.capacity);
  const int64_t width = flat ? mask.length + op.nodes : op.capacity / op.nodes;
  if (bits) {
    const int64_t count = mask.flat_elements(mask.request);
    for (int64_t i = 0, node = 0, key = 0; i < count; ++i) {
      const int64_t before = std::clamp<int64_t>((mask.length - key) / 8, 0, count - 1 - i);  // whole bytes of context
      std::fill_n(out + i, before, T(0xFF));
      i += before, key += 8 * before;
      out[i] = T(mask.byte_at(node, key, width));
      for (key += 8; key >= width; key -= width) ++node;
    }
  } else if (op.format == MaskFormat::packed) {
    constexpr int64_t kKeys = 8 * sizeof(T);
    for (int64_t i = 0; i < op.nodes * width; ++i) out[i] = T(mask.bits(i / width, i % width * kKeys, kKeys));
  } else {
    const T no = T(mask.no()), yes = T(no == 0);
    for (int64_t node = 0; node < op.nodes; ++node) {
      T* const row = out + node * width;
      std::fill_n(row, mask.length, yes);
      std::fill(row + mask.length, row + width, no);
      for (int64_t key = 0; key < op.nodes; key += 32)
        for (uint32_t some = mask.bits(node, mask.length + key, 32); some != 0; some &= some - 1)
          row[mask.length + key + __builtin_ctz(some)] = yes;
    }
  }
  if (flat && mask.request + 1 == op.batch)  // what no request uses is 0
    std::fill(out + mask.flat_elements(mask.request), static_cast<T*>(op.out) + op.batch * op.capacity, T(0));
}

}  // namespace

void tree_mask(const TreeMask& op, int64_t request) {
  const Attended mask{op, request, live_nodes(op.parents + request * op.nodes, op.nodes)};
  with_word(op.element, [&](auto word) { write_mask<decltype(word)>(mask); });
}

void compact_kv(const CompactKv& op, char* cache, int64_t request) {
  along_path(op, request, [&](int64_t from, int64_t to) {
    for (int64_t h = 0; h < op.heads; ++h)
      std::memcpy(cache + to + h * op.head_stride, cache + from + h * op.head_stride, size_t(op.row_bytes));
  });
}

}  // namespace specdec
