// What all programs work with.
//
// One launch an operation. Several blocks measure a row, each its spans.
#pragma once

#include "distribution.h"
#include "launch.h"

namespace specdec::cuda {

struct Workspace : Plan {
  SPECDEC_DEVICE Table table(int64_t index) const { return {tables + index * Table::floats(spans), spans}; }
};

// Which part of the work a block has: of rows, first rows of all requests first; of a crew, its block of it.
struct Part {
  int request, row, slice;
};
template <class Op>
SPECDEC_DEVICE Part part_of(const Op& op, unsigned index, unsigned slices) {
  const unsigned requests = unsigned(requests_of(common_of(op))), rest = index / requests;
  return {int(index % requests), int(rest / slices), int(rest % slices)};
}

}  // namespace specdec::cuda
