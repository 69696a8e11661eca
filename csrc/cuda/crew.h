// The blocks that share a request, where a rule has to go over its rows again and again: block, recursive, traversal.
// All of them run the same program on the same numbers. What differs is which spans of a row a block goes over; after
// each pass they meet, and each adds up what all of them found, in the same order. They are launched together, so that
// none waits for a block that has not started.
#pragma once

#include "verify.h"

namespace specdec::cuda {

template <class T, class Op>
class CrewProgram : protected VerifyProgram<T, Op, By::acceptance> {
  using Base = VerifyProgram<T, Op, By::acceptance>;

 public:
  SPECDEC_DEVICE CrewProgram(const Team& team, const Op& op, const Workspace& work, const Part& part)
      : Base(team, op, work, part), first_span_(team.warp() * work.slices + part.slice) {}

 protected:
  using Base::counters, Base::slice_, Base::target, Base::team_, Base::work_;

  // What every block wrote before, each sees behind.
  SPECDEC_DEVICE void meet() {
    team_.sync();
    if (work_.slices > 1) {
      due_ += uint32_t(work_.slices);
      if (team_.rank() == 0) {
        add_to(counters(), 1);
        while (glance(counters()) < due_) wait_a_little();
        acquire();
      }
    }
    team_.sync();
  }
  // The last block of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    team_.sync();
    if (team_.rank() != 0 || come_to(counters() + 1, uint32_t(work_.slices - 1)) != uint32_t(work_.slices - 1)) return;
    acquire();
    put(counters(), 0u);
  }

  // The spans of a pass go around all blocks, so that a row keeps as many multiprocessors busy as there are; who has
  // less of one row has more of the next.
  SPECDEC_DEVICE int stride() const { return work_.slices * kWarps; }
  SPECDEC_DEVICE int first_span() {
    const int first = first_span_;
    first_span_ = (first + stride() - work_.spans % stride()) % stride();
    return first;
  }
  // Rules by crews keep so many registers that spans of float32 cannot be held.
  SPECDEC_DEVICE void measure_node(int node) {
    constexpr bool kWhole = !std::is_same_v<T, float>;
    const int first = first_span();
    measure<false, kWhole>(target(node), target(node).sums(), first, work_.spans, stride(), {});
    if (Base::measures_draft(node))
      measure<false, kWhole>(Base::draft(node), Sums::plain, first, work_.spans, stride(), {});
  }

  // Where the sums of a pass over a row are left, one of each span. Two places in turn: a block that is ahead begins
  // the next pass while others still read the sums of this one.
  SPECDEC_DEVICE float* span_sums(int node, int pass) const {
    const Table table = target(node).table();
    return pass % 2 == 0 ? table.time(0) : table.winner(0);
  }
  // The sums of weights, `weigh(first, w)` giving those of eight ids.
  template <class F>
  SPECDEC_DEVICE void sum_spans(float* sums, const F& weigh) {
    for (int span = first_span(); span < work_.spans; span += stride()) {
      float mass = 0.0f;
      SPECDEC_UNROLL_BY(2)
      for (int u = 0; u < kLoads; ++u) {
        float w[kElements];
        weigh(span * kSpan + load_offset(team_, u), w);
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) mass += w[e];
      }
      mass = team_.in_warp(mass, Plus());
      if (team_.lane() == 0) put(sums + span, mass);
    }
  }
  // Their total, in an order that does not depend on who went over which span.
  SPECDEC_DEVICE float total_of(const float* sums) const {
    float sum = 0.0f;
    SPECDEC_ROLLED
    for (int span = team_.rank(); span < work_.spans; span += kThreads) sum += fresh(sums + span);
    return team_.reduce(sum, Plus());
  }

 private:
  int first_span_;
  uint32_t due_ = 0;
};

}  // namespace specdec::cuda
