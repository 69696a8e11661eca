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
  SPECDEC_DEVICE CrewProgram(const Op& op, const Workspace& work, const Part& part)
      : Base(op, work, part), first_span_(block::warp() * work.slices + part.slice) {}

 protected:
  using Base::counters, Base::slice_, Base::target, Base::work_;

  // What every block wrote before, each sees behind.
  SPECDEC_DEVICE void meet() {
    block::sync();
    if (work_.slices > 1) {
      due_ += uint32_t(work_.slices);
      if (block::rank() == 0) {
        add_to(counters(), 1);
        while (glance(counters()) < due_) wait_a_little();
        acquire();
      }
    }
    block::sync();
  }
  // The last block of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    block::sync();
    if (block::rank() != 0 || come_to(counters() + 1, uint32_t(work_.slices - 1)) != uint32_t(work_.slices - 1)) return;
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
  // Rules by crews keep so many registers that a whole span of float32 and the next one cannot be held.
  SPECDEC_DEVICE void measure_node(int i) {
    Base::template measure_node<!std::is_same_v<T, float>>(i, first_span(), work_.spans, stride());
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
        weigh(span * kSpan + load_offset(u), w);
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) mass += w[e];
      }
      mass = block::in_warp(mass, std::plus<>());
      if (block::lane() == 0) put(sums + span, mass);
    }
  }
  // Their total, in an order that does not depend on who went over which span.
  SPECDEC_DEVICE float total_of(const float* sums) const {
    float sum = 0.0f;
    SPECDEC_ROLLED
    for (int span = block::rank(); span < work_.spans; span += kThreads) sum += fresh(sums + span);
    return block::reduce(sum, std::plus<>());
  }

 private:
  int first_span_;
  uint32_t due_ = 0;
};

// Rule block (Sun et al., arXiv:2403.10444): the longest prefix that its uniform accepts. All rows are measured, then
// judged, each by a block of the crew; then the residuals are summed, and one block decides. The masses of what is left
// of all rows but the first do not depend on each other: one pass. The names follow algorithms.md, 2.
template <class T>
class BlockProgram : CrewProgram<T, VerifyChain> {
  using Base = CrewProgram<T, VerifyChain>;
  using Base::judged, Base::live_, Base::meet, Base::slice_, Base::span_sums, Base::work_;

 public:
  using Base::Base;

  SPECDEC_DEVICE void run() {
    for (int i = 0; i < live_; ++i) Base::measure_node(i);
    meet();
    for (int i = slice_; i < live_; i += work_.slices) Base::judge(i);
    meet();
    double path_prob = 1.0;
    int usable = 0;
    for (; usable + 1 < live_ && path_prob > 0.0; ++usable) {  // once 0, it stays 0
      const Judged row = fresh(judged() + usable);
      if (!row.tested) break;
      if (usable > 0 && path_prob < 1.0) {
        const Residual residual = Base::residual_of(row, path_prob);
        Base::sum_spans(span_sums(usable, 0), [&](int first, float (&w)[kElements]) {
          Base::weigh(usable, residual, first, w);
          Base::set_apart(row, first, w);
        });
      }
      path_prob = after(path_prob, row);
    }
    meet();
    if (slice_ == 0) end_path(usable);
    Base::leave();
  }

 private:
  SPECDEC_DEVICE void end_path(int usable) const {
    int accepted = 0;
    double path_prob = 1.0, accepted_prob = 1.0;
    for (int i = 1; i <= usable; ++i) {
      path_prob = after(path_prob, fresh(judged() + i - 1));
      double threshold = path_prob;
      if (i < usable && path_prob < 1.0) {
        const double left = path_prob * double(Base::total_of(span_sums(i, 0)));
        threshold = left / (left + 1.0 - path_prob);
      }
      if (Base::uniform_of(i) < threshold) accepted = i, accepted_prob = path_prob;
    }
    // A row that was read and is not usable makes the result so, even behind the end of the path.
    const bool valid = usable + 1 == live_ || path_prob == 0.0;
    Base::end_at(accepted, accepted_prob, accepted < usable, valid);
  }

  // The path probability behind a row. What the target excludes is never accepted, whatever the draft was declared to
  // be: 0 / 0 is 0.
  SPECDEC_DEVICE static double after(double path_prob, const Judged& row) {
    return row.prob > 0.0 ? fmin(1.0, path_prob * row.prob / row.draft_prob) : 0.0;
  }
};

template <class F>
auto with_program(const VerifyChain& op, const F& f) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (op.rule) {
      case Rule::token: return f(TypeOf<VerifyProgram<T, VerifyChain, By::acceptance>>());
      case Rule::block: return f(TypeOf<BlockProgram<T>>());
      default: return f(TypeOf<VerifyProgram<T, VerifyChain, By::race>>());
    }
  });
}

}  // namespace specdec::cuda
