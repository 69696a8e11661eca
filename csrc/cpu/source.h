// One row of a request as its distribution sees it: logits with bias, penalties and mask applied on the way, tile by
// tile, so that no processed row is ever written.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/elements.h"
#include "kernels.h"

namespace specdec {

inline float logit_of(const Row& row, int64_t token) {
  const int64_t column = column_of(row.columns, token);
  if (column < 0) return -INFINITY;
  switch (row.dtype) {
    case DType::bf16: return to_float(static_cast<const BFloat16*>(row.logits)[column]);
    case DType::f16: return to_float(static_cast<const Half*>(row.logits)[column]);
    default: return static_cast<const float*>(row.logits)[column];
  }
}

// Fetches logits that will be needed, where they lie together. The empty statement keeps it: GCC takes a function that
// only fetches for one without effect, and leaves out its calls.
inline void prefetch(const Row& row, int64_t first, int64_t count) {
  if (row.columns.table != nullptr) return;
  const auto* const begin = static_cast<const char*>(address({.data = row.logits, .dtype = row.dtype}, first));
  for (int64_t at = 0; at < count * bytes_of(row.dtype); at += 64) __builtin_prefetch(begin + at);
  asm volatile("");
}

// The drafts before a row, which its penalties count as output.
struct Prefix {
  const int64_t* tokens = nullptr;
  int64_t length = 0;

  int64_t count(int64_t token) const { return std::count(tokens, tokens + length, token); }
};

class Source {
 public:
  explicit Source(const Row& row, const uint32_t* mask = nullptr, const Adjustments& adjustments = {},
                  const Prefix& prefix = {})
      : row_(row), mask_(mask), adjustments_(adjustments), prefix_(prefix) {}

  const Row& row() const { return row_; }
  bool plain() const { return mask_ == nullptr && adjustments_.count == 0; }

  // Whether any logit of tiles [begin, end) differs from the row's own.
  bool touches(int64_t begin, int64_t end) const {
    if (plain()) return false;
    const int64_t first = begin * kTile, last = std::min(end * kTile, row_.vocab);
    const int64_t adjustment = first_adjustment(adjustments_, first);
    if (adjustment < adjustments_.count && adjustments_.ids[adjustment] < last) return true;
    return mask_ && std::any_of(mask_ + first / 32, mask_ + words_of(last), [](uint32_t w) { return w != ~0u; });
  }

  // The logits of `count` tiles, -inf past the end.
  void fill(int64_t tile, int64_t count, float* out) const {
    const int64_t first = tile * kTile, last = std::min(first + count * kTile, row_.vocab);
    for (int64_t v = first; v < last; ++v) out[v - first] = logit_of(row_, v);
    std::fill(out + (last - first), out + count * kTile, -INFINITY);
    for (int64_t e = first_adjustment(adjustments_, first); e < adjustments_.count && adjustments_.ids[e] < last; ++e) {
      float& x = out[adjustments_.ids[e] - first];
      x = adjusted(x, e);
    }
    if (mask_)
      for (int64_t v = first; v < last; ++v)
        if (!allows(v)) out[v - first] = -INFINITY;
  }

  // A tile where the kernels can read it: in the row, or filled into `buffer` (128) as the first of a row of its own.
  struct At {
    Row row;
    int64_t tile;
  };
  At at(int64_t tile, float* buffer) const {
    if (!touches(tile, tile + 1)) return {row_, tile};
    fill(tile, 1, buffer);
    return {{buffer, DType::f32, kTile}, 0};
  }

  float logit(int64_t token) const {
    if (mask_ && !allows(token)) return -INFINITY;
    const float x = logit_of(row_, token);
    const int64_t e = first_adjustment(adjustments_, token);
    return e < adjustments_.count && adjustments_.ids[e] == token ? adjusted(x, e) : x;
  }

 private:
  bool allows(int64_t token) const { return mask_[token / 32] >> (token % 32) & 1; }

  float adjusted(float x, int64_t e) const {
    return specdec::adjusted(adjustments_, e, prefix_.count(adjustments_.ids[e]), x);
  }

  Row row_;
  const uint32_t* mask_;
  Adjustments adjustments_;
  Prefix prefix_;
};

}  // namespace specdec
