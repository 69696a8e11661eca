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
  bool ahead;  // a tree's rows are measured before any is asked for

  SPECDEC_DEVICE Table table(int64_t place) const {
    return {tables + 2 * place * entries, tables + (2 * place + 1) * entries};
  }
};

inline Workspace workspace_of(const Shape& shape, const Scratch& scratch) {
  return {scratch.tables, scratch.places, scratch.counters, shape.slices, shape.entries, shape.ahead};
}

template <bool P>
SPECDEC_DEVICE void measure_slice(const Team& team, const Rows& rows, int64_t i, float scale, int64_t part,
                                  int64_t slices, const Table& table) {
  const int64_t tiles = tiles_of(rows.vocab), size = (tiles + slices - 1) / slices;
  const int64_t begin = part * size, end = begin + size < tiles ? begin + size : tiles;
  tabulate<P>(team, rows, i, begin, end, scale, -INFINITY, table);
}

// All of row i.
template <bool P>
SPECDEC_DEVICE void measure_row(const Team& team, const Rows& rows, int64_t i, float scale, const Table& table) {
  team.sync();  // all have read what is overwritten now
  tabulate<P>(team, rows, i, 0, tiles_of(rows.vocab), scale, -INFINITY, table);
  team.sync();
}

}  // namespace specdec::cuda
