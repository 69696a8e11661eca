// Attention masks of trees of drafts, and moving keys and values of accepted nodes into place.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/elements.h"
#include "verify.h"

namespace specdec {
namespace {

// Ancestors of every node and itself, a bit each; itself alone behind the last node.
class Ancestors {
 public:
  Ancestors(const int64_t* parents, int64_t nodes) : words_((nodes + 63) / 64), bits_(size_t(nodes * words_)) {
    const int64_t live = live_nodes(parents, nodes);
    for (int64_t i = 0; i < nodes; ++i) {
      if (i > 0 && i < live) std::copy_n(row(parents[i]), words_, row(i));
      row(i)[i / 64] |= uint64_t(1) << (i % 64);
    }
  }

  bool operator()(int64_t node, int64_t ancestor) const { return row(node)[ancestor / 64] >> (ancestor % 64) & 1; }

  // `count` bits from `first` on, a divisor of 64 apart.
  uint64_t word(int64_t node, int64_t first, int64_t count) const {
    return row(node)[first / 64] >> (first % 64) & ((uint64_t(1) << count) - 1);
  }

 private:
  uint64_t* row(int64_t node) { return bits_.data() + node * words_; }
  const uint64_t* row(int64_t node) const { return bits_.data() + node * words_; }

  int64_t words_;
  std::vector<uint64_t> bits_;
};

template <class Word>
void fill_packed(const TreeMask& op, int64_t request, const Ancestors& ancestors) {
  constexpr int64_t kBits = 8 * sizeof(Word);
  const int64_t words = (op.nodes + kBits - 1) / kBits;
  Word* out = static_cast<Word*>(op.out) + request * op.nodes * words;
  for (int64_t i = 0; i < op.nodes; ++i)
    for (int64_t w = 0; w < words; ++w) *out++ = Word(ancestors.word(i, w * kBits, kBits));
}

// Rows of `width` keys: the context, the nodes, and nothing behind them.
template <class T>
void fill_rows(const TreeMask& op, T* out, int64_t width, int64_t length, const Ancestors& ancestors, T yes, T no) {
  for (int64_t i = 0; i < op.nodes; ++i, out += width) {
    std::fill_n(out, length, yes);
    for (int64_t j = 0; j < op.nodes; ++j) out[length + j] = ancestors(i, j) ? yes : no;
    std::fill(out + length + op.nodes, out + width, no);
  }
}

template <class T>
void fill_dense(const TreeMask& op, int64_t request, int64_t length, const Ancestors& ancestors, T yes, T no) {
  T* out = static_cast<T*>(op.out) + request * op.room;
  fill_rows(op, out, op.room / op.nodes, length, ancestors, yes, no);
}

// Sets the bits [first, last): whole bytes at once.
void set_bits(uint8_t* out, int64_t first, int64_t last) {
  for (; first < last && first % 8 != 0; ++first) out[first / 8] |= uint8_t(1 << (first % 8));
  std::fill(out + first / 8, out + std::max(first, last) / 8, uint8_t(0xFF));
  for (first = std::max(first, last / 8 * 8); first < last; ++first) out[first / 8] |= uint8_t(1 << (first % 8));
}

void fill_flat_bits(const TreeMask& op, uint8_t* out, int64_t length, const Ancestors& ancestors) {
  const int64_t width = length + op.nodes;
  std::fill_n(out, (op.nodes * width + 7) / 8, uint8_t(0));
  for (int64_t i = 0; i < op.nodes; ++i) {
    set_bits(out, i * width, i * width + length);
    for (int64_t j = 0; j <= i; ++j)
      if (ancestors(i, j)) set_bits(out, i * width + length + j, i * width + length + j + 1);
  }
}

// Elements of a flat mask that the first `requests` take.
int64_t flat_size(const TreeMask& op, int64_t requests) {
  int64_t size = 0;
  for (int64_t b = 0; b < requests; ++b) {
    const int64_t keys = op.nodes * (op.context_lens[b] + op.nodes);
    size += op.format == MaskFormat::flat_bits ? (keys + 7) / 8 : keys;
  }
  return size;
}

}  // namespace

void tree_mask(const TreeMask& op, int64_t request) {
  const Ancestors ancestors(op.parents + request * op.nodes, op.nodes);
  const int64_t length = op.context_lens ? op.context_lens[request] : 0;
  if (op.format == MaskFormat::packed) {
    switch (op.element) {
      case MaskElement::byte: return fill_packed<uint8_t>(op, request, ancestors);
      case MaskElement::word16: return fill_packed<uint16_t>(op, request, ancestors);
      default: return fill_packed<uint32_t>(op, request, ancestors);
    }
  }
  if (op.format == MaskFormat::dense) {
    switch (op.element) {
      case MaskElement::f32: return fill_dense<float>(op, request, length, ancestors, 0.0f, -INFINITY);
      case MaskElement::bf16:
        return fill_dense<BFloat16>(op, request, length, ancestors, {0}, negative_infinity(BFloat16{}));
      case MaskElement::f16: return fill_dense<Half>(op, request, length, ancestors, {0}, negative_infinity(Half{}));
      default: return fill_dense<uint8_t>(op, request, length, ancestors, 1, 0);
    }
  }
  uint8_t* out = static_cast<uint8_t*>(op.out);
  const int64_t start = flat_size(op, request);
  if (op.format == MaskFormat::flat_bits)
    fill_flat_bits(op, out + start, length, ancestors);
  else
    fill_rows<uint8_t>(op, out + start, length + op.nodes, length, ancestors, 1, 0);
  if (request + 1 == op.batch) std::fill(out + flat_size(op, op.batch), out + op.batch * op.room, uint8_t(0));
}

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
