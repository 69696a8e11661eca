// The blocks that share a request, where a rule has to go over its rows again and again: block, recursive, traversal.
// All of them run the same program on the same numbers. What differs is which spans of a row a block goes over; after
// each pass they meet, and each adds up what all of them found, in the same order. They are launched together, so that
// none waits for a block that has not started.
#pragma once

#include "request.h"

namespace specdec::cuda {

class Crew {
 public:
  SPECDEC_DEVICE Crew(const Team& team, uint32_t* counters, int block, int blocks)
      : team_(team), counters_(counters), block_(block), blocks_(blocks) {}

  SPECDEC_DEVICE int block() const { return block_; }
  SPECDEC_DEVICE int blocks() const { return blocks_; }
  // The spans of a pass go around all blocks, so that a row keeps as many multiprocessors busy as there are.
  SPECDEC_DEVICE int first_span() const { return team_.warp() * blocks_ + block_; }
  SPECDEC_DEVICE int stride() const { return blocks_ * kWarps; }

  // What every block wrote before, each sees behind.
  SPECDEC_DEVICE void meet() {
    team_.sync();
    if (blocks_ > 1) {
      due_ += uint32_t(blocks_);
      if (team_.rank() == 0) {
        add_to(counters_, 1);
        while (glance(counters_) < due_) wait_a_little();
        acquire();
      }
    }
    team_.sync();
  }

  // The last block of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    team_.sync();
    if (team_.rank() != 0 || come_to(counters_ + 1, uint32_t(blocks_ - 1)) != uint32_t(blocks_ - 1)) return;
    acquire();
    put(counters_, 0u);
  }

 private:
  const Team& team_;
  uint32_t* const counters_;
  const int block_, blocks_;
  uint32_t due_ = 0;
};

// Where the sums of a pass over a row are left, one of each span. Two places in turn: a block that is ahead begins the
// next pass while others still read the sums of this one.
SPECDEC_DEVICE float* span_sums(const Table& table, int pass) {
  return pass % 2 == 0 ? table.time(0) : table.winner(0);
}

// Their total, in an order that does not depend on who went over which span.
SPECDEC_DEVICE float total_of(const Team& team, const Table& table, int pass) {
  float sum = 0.0f;
  SPECDEC_ROLLED
  for (int span = team.rank(); span < table.spans; span += kThreads) sum += fresh(span_sums(table, pass) + span);
  return team.reduce(sum, Plus());
}

}  // namespace specdec::cuda
