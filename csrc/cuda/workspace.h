// What all programs work with.
//
// One launch an operation. Several blocks measure a row, each its spans.
#pragma once

#include "distribution.h"
#include "launch.h"

namespace specdec::cuda {

// Scratch of a launch. The counters are 0 between launches: whoever uses them leaves them so.
struct Workspace {
  float* tables;
  void* places;  // what is known of every row, as the program has it
  uint32_t* counters;
  int spans;           // of a row
  int slices, length;  // blocks that share a row, or a request, and spans of a slice of a row
  bool in_waves;       // blocks start after others have ended, and may find that they are not needed
  bool ahead;          // a tree's rows are measured before any is asked for

  SPECDEC_DEVICE Table table(int64_t index) const { return {tables + index * Table::floats(spans), spans}; }
};

inline Workspace workspace_of(const Shape& shape, const Scratch& scratch) {
  return {scratch.tables,     scratch.places,    reinterpret_cast<uint32_t*>(scratch.counters),
          int(shape.spans()), int(shape.slices), int(shape.length),
          shape.in_waves,     shape.ahead};
}

// Which part of the work a block has: of rows, first rows of all requests first; of a crew, its block of it.
struct Part {
  int request, row, slice;
};
template <class Op>
SPECDEC_DEVICE Part part_of(const Op& op, unsigned program, unsigned slices) {
  const unsigned requests = unsigned(requests_of(common_of(op))), rest = program / requests;
  return {int(program % requests), int(rest / slices), int(rest % slices)};
}

}  // namespace specdec::cuda
