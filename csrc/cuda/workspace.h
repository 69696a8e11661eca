// What all programs work with.
//
// One launch an operation. Several teams measure a row, each its slice of the tiles. The last of them to finish goes on
// alone; nobody waits for anybody.
#pragma once

#include "launch.h"
#include "laws.h"

namespace specdec::cuda {

// Scratch of a launch. The counters are 0 between launches: whoever uses them leaves them so.
struct Workspace {
  float* tables;
  void* places;  // what is known of every row, as the program has it
  int32_t* counters;
  int64_t slices, entries;

  SPECDEC_DEVICE Table table(int64_t place) const {
    return {tables + 2 * place * entries, tables + (2 * place + 1) * entries};
  }
};

template <bool P>
SPECDEC_DEVICE void measure_slice(const Team& team, const Rows& rows, int64_t i, float scale, int64_t part,
                                  int64_t slices, const Table& table) {
  const int64_t tiles = tiles_of(rows.vocab), size = (tiles + slices - 1) / slices;
  const int64_t begin = part * size, end = begin + size < tiles ? begin + size : tiles;
  tabulate<P>(team, rows, i, begin, end, scale, -INFINITY, table);
}

SPECDEC_DEVICE Edits edits_of(const Processing& processing, int64_t request) {
  if (processing.ids == nullptr) return {};
  const int64_t first = request * processing.edits;
  const float* own = processing.penalties + 3 * request;
  return {processing.edits,
          processing.ids + first,
          processing.counts + 2 * first,
          processing.bias + first,
          own[0],
          own[1],
          own[2]};
}

SPECDEC_DEVICE const void* offset(const Logits& logits, int64_t elements) {
  return static_cast<const char*>(logits.data) + elements * (logits.dtype == DType::f32 ? 4 : 2);
}

// The rows of a request's drafts, whose laws take no processing.
SPECDEC_DEVICE Rows draft_rows(const Verification& op, int64_t request) {
  Rows rows;
  rows.logits = offset(op.draft, request * op.draft.request_stride);
  rows.dtype = op.draft.dtype, rows.stride = op.draft.row_stride, rows.vocab = op.vocab;
  return rows;
}

// The rows of a request's target, the first of them `row` in the order of all masks, and its drafts from `draft`.
template <bool P>
SPECDEC_DEVICE Rows target_rows(const Verification& op, int64_t request, int64_t elements, int64_t row) {
  Rows rows;
  rows.logits = offset(op.target, elements);
  rows.dtype = op.target.dtype, rows.stride = op.target.row_stride, rows.vocab = op.vocab;
  rows.drafts = op.tokens;
  rows.first_draft = request * op.token_strides[0], rows.draft_stride = op.token_strides[1];
  if constexpr (P) {
    if (op.processing.bitmask) rows.mask = op.processing.bitmask + row * ((op.vocab + 31) / 32);
    rows.edits = edits_of(op.processing, request);
  }
  return rows;
}

}  // namespace specdec::cuda
