// `verify_chain`: rule block, and which program each rule has.
#pragma once

#include "crew.h"

namespace specdec::cuda {

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
          Base::weigh(usable, residual, first, w,
                      [&](int, float (&apart)[kElements]) { Base::set_apart(row, first, apart); });
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
    Base::end_at(accepted, accepted_prob, accepted < usable);
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
