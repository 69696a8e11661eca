// `verify_chain`.
//
// Rules token and coupled: by rows, in the order of the drafts. Rule block: a crew, which reads all rows.
#pragma once

#include "residual.h"

namespace specdec::cuda {

// All that a rule asks of a row once it was judged.
struct alignas(16) Judged {
  Distribution target, draft;
  double prob = 0.0, draft_prob = 1.0;  // of the draft, under target and draft
  int drawn = -1;                       // rule coupled, and greedily
  bool valid = false;
  bool tested = false;  // there is a draft, and its distribution is usable
  bool passed = false;  // on its own
};

// One request of `verify_chain`.
template <class T, Rule kRule>
class ChainProgram : ResidualProgram<T> {
  using Base = ResidualProgram<T>;
  using Base::all_, Base::b_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::dense, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::draw_after, Base::is_token, Base::position, Base::request,
      Base::sampling, Base::seed, Base::target, Base::token, Base::write_logprobs;

 public:
  SPECDEC_DEVICE ChainProgram(const Team& team, const VerifyChain& op, const Workspace& work, const Part& part)
      : Base(team, op.common, work, part.request, op.cu_rows, nullptr),
        op_(op),
        row_(part.row),
        slice_(part.slice),
        room_(int(op.room(part.request))) {}

  SPECDEC_DEVICE void run() {
    if constexpr (kRule == Rule::block)
      run_as_crew();
    else
      run_by_rows();
  }

 private:
  SPECDEC_DEVICE void run_by_rows() {
    if (row_ > room_) return;
    if (work_.in_waves) {
      drafted_ = count_drafts();
      if (row_ > drafted_) return;
    }
    this->run_row(
        row_, [&] { return drafted_ + 1; }, [&] { measure_slices(); },
        [&] {
          const int end = judge(row_) || op_.independent ? rows_ : row_;
          return [end](int row) { return row > end; };
        },
        [&] { decide(end_of_path(), drafted_); });
  }

  // All rows are measured, then judged, each by a block of the crew; then the residuals are, and one block decides.
  SPECDEC_DEVICE void run_as_crew() {
    Crew crew(team_, counters(), slice_, work_.slices);
    drafted_ = count_drafts();
    const int stride = crew.stride(), rest = work_.spans % stride;
    int first = crew.first_span();
    for (int i = 0; i <= drafted_; ++i) {
      measure_row<T>(team_, target(), i, first, work_.spans, stride, sampling().measure(vocab_), target_table(i));
      first = (first + stride - rest) % stride;  // who had less of this row has more of the next
      if (!measures_draft() || i == drafted_) continue;
      measure_row<T>(team_, draft(), i, first, work_.spans, stride, draft_measure(), draft_table(i));
      first = (first + stride - rest) % stride;
    }
    crew.meet();
    for (int i = crew.block(); i <= drafted_; i += crew.blocks()) judge(i);
    crew.meet();
    verify_block_rule(crew);
    crew.leave();
  }

  SPECDEC_DEVICE Table target_table(int i) const { return work_.table(2 * (request() * rows_ + i)); }
  SPECDEC_DEVICE Table draft_table(int i) const { return work_.table(2 * (request() * rows_ + i) + 1); }
  SPECDEC_DEVICE Judged* place(int i) const { return static_cast<Judged*>(work_.places) + request() * rows_ + i; }

  // Whether the row of the draft has to be measured.
  SPECDEC_DEVICE bool measures_draft() const {
    return kRule != Rule::coupled && dense() && all_.draft_stats == nullptr && !sampling().greedy();
  }

  // Where all blocks start at once, what they ask about drafts comes while the row does.
  SPECDEC_DEVICE void measure_slices() {
    measure_slice<kRule == Rule::coupled>(team_, target(), row_, sampling().measure(vocab_), coupled_noise(row_), work_,
                                          slice_, target_table(row_), [&] {
                                            if (!work_.in_waves) drafted_ = count_drafts();
                                          });
    if (measures_draft() && row_ < drafted_)
      measure_slice<false>(team_, draft(), row_, draft_measure(), {}, work_, slice_, draft_table(row_), [] {});
  }

  // -1, or an id that is none, ends the drafts.
  SPECDEC_DEVICE int count_drafts() const {
    SPECDEC_ROLLED
    for (int first = 0; first < room_; first += 32) {
      const uint32_t ends =
          team_.bits([&](int bit) { return first + bit >= room_ || !is_token(any_token(first + bit)); });
      if (ends != 0) return first + first_bit(ends);
    }
    return room_;
  }

  // Judges a row whose tables are made, and writes what a rule asks of it. Whether its draft passes on its own, by
  // its uniform or, coupled, by being what is drawn.
  SPECDEC_DEVICE bool judge(int i) const {
    const int id = i < drafted_ ? token(i) : -1;
    Judged row;
    row.valid = distribution_of(team_, target(), i, sampling(), target_table(i), row.target);
    row.tested = id >= 0 && row.valid;
    row.drawn = row.target.argmax;
    if constexpr (kRule == Rule::coupled) {
      if (row.drawn < 0) row.drawn = flat_race(team_, target(), i, row.target, target_table(i), coupled_noise(i));
      row.passed = row.tested && id == row.drawn;
    } else {
      // A greedy target accepts its argmax and emits its argmax: there no distribution of the draft matters.
      row.draft.argmax = id;
      const bool certain = row.target.argmax >= 0;
      if (dense() && row.tested && !certain) row.tested = draft_distribution(i, draft_table(i), row.draft);
      if (row.tested) {
        const double prob = prob_of(row.target, target().logit(i, id), id);
        const double draft_prob = row.draft.argmax < 0 ? prob_of(row.draft, draft_logit(i, id), id) : 1.0;
        row.tested = draft_prob < INFINITY;
        // Strict: a token the target gives probability 0 is never accepted, even by uniform 0.
        row.passed = row.tested && uniform(seed(), position(), i) * draft_prob < prob;
        row.prob = prob, row.draft_prob = draft_prob;
      }
    }
    if (team_.rank() == 0) put(place(i), row);
    return row.passed;
  }

  // `kept` drafts are accepted, of `usable` that could be.
  SPECDEC_DEVICE void decide(int kept, int usable, double path_prob = 1.0) const {
    int independent = 0;
    SPECDEC_ROLLED
    for (int i = team_.rank(); op_.independent && i < drafted_; i += kThreads) independent += fresh(place(i)).passed;
    if (op_.independent) independent = team_.reduce(independent, Plus());
    const Judged last = fresh(place(kept));
    if (team_.rank() == 0) {
      all_.out_accepted[b_] = kept;
      all_.out_valid[b_] = last.valid && (kept == drafted_ || last.tested);
      op_.out_counters[2 * b_] = drafted_;
      op_.out_counters[2 * b_ + 1] = op_.independent ? independent : -1;
    }
    int emitted = last.drawn;
    if constexpr (kRule != Rule::coupled) {
      const Residual residual = residual_of(last, path_prob);
      if (last.target.argmax < 0)
        emitted = draw_after(kept, last.target.filtered(), target_table(kept), residual, kept < usable && last.tested,
                             [&](int first, float* w) {
                               SPECDEC_UNROLL
                               for (int k = 0; k < 4; ++k)
                                 if (residual.certain && first + k == last.draft.argmax) w[k] = 0.0f;
                             });
    }
    SPECDEC_ROLLED
    for (int i = team_.rank(); i < rows_; i += kThreads)
      all_.out_tokens[int64_t(b_) * rows_ + i] = i < kept ? token(i) : i == kept ? emitted : -1;
    SPECDEC_ROLLED
    for (int i = 0; i < rows_ && all_.out_logprobs != nullptr; ++i)
      write_logprobs(i, i <= kept ? i : -1, i < kept ? token(i) : emitted, place(i));
  }

  // Rules token and coupled: the first row whose draft did not pass, or that has none.
  SPECDEC_DEVICE int end_of_path() const {
    int end = drafted_;
    SPECDEC_ROLLED
    for (int i = team_.rank(); i < end; i += kThreads)
      if (!fresh(place(i)).passed) end = i;
    return team_.reduce(end, Smaller());
  }

  // Rule block (Sun et al., arXiv:2403.10444): the longest prefix that its uniform keeps. The masses of what is left of
  // all rows but the first do not depend on each other: one pass. The names follow algorithms.md, 2.
  SPECDEC_DEVICE void verify_block_rule(Crew& crew) const {
    double path_prob = 1.0;
    int usable = 0;
    for (; usable < drafted_ && path_prob > 0.0; ++usable) {  // once 0, it stays 0
      const Judged row = fresh(place(usable));
      if (!row.tested) break;
      if (usable > 0 && path_prob < 1.0) sum_residual(crew, usable, row, path_prob);
      path_prob = after(path_prob, row);
    }
    crew.meet();
    if (crew.block() != 0) return;
    int kept = 0;
    double threshold_prob = 1.0, kept_prob = 1.0;
    for (int i = 1; i <= usable; ++i) {
      threshold_prob = after(threshold_prob, fresh(place(i - 1)));
      double threshold = threshold_prob;
      if (i < usable && threshold_prob < 1.0) {
        const double left = threshold_prob * double(total_of(team_, target_table(i), 0));
        threshold = left / (left + 1.0 - threshold_prob);
      }
      if (uniform(seed(), position(), i - 1) < threshold) kept = i, kept_prob = threshold_prob;
    }
    decide(kept, usable, kept_prob);
  }

  // The path probability behind a row. What the target excludes is never accepted, whatever the draft was declared to
  // be: 0 / 0 is 0.
  SPECDEC_DEVICE static double after(double path_prob, const Judged& row) {
    return row.prob > 0.0 ? fmin(1.0, path_prob * row.prob / row.draft_prob) : 0.0;
  }

  // (target - draft / path_prob)+, and nothing of a draft that is a point mass.
  SPECDEC_DEVICE static Residual residual_of(const Judged& row, double path_prob) {
    return {Probabilities(row.target), Probabilities(row.draft, path_prob), row.draft.argmax >= 0};
  }

  // The masses of what is left of row i, of this warp's spans.
  SPECDEC_DEVICE void sum_residual(const Crew& crew, int i, const Judged& row, double path_prob) const {
    const Residual residual = residual_of(row, path_prob);
    Base::template sum_spans<true>(
        crew, i, !residual.certain, span_sums(target_table(i), 0), [&](float x, float y) { return residual(x, y); },
        [&](int span, LaneBits& apart) {
          const int bit = residual.certain ? LaneBits::bit_of(team_, span, row.draft.argmax) : -1;
          if (bit >= 0) apart.add(bit);
          return 0.0f;
        });
  }

  const VerifyChain& op_;
  const int row_, slice_, room_;
  int drafted_ = 0;
};

static_assert(sizeof(Judged) <= kPlaceBytes);

// Calls f with the type of the program of an operation, as with_dtype does with that of its logits.
template <class F>
auto with_program(const VerifyChain& op, const F& f) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (op.rule) {
      case Rule::token: return f(TypeOf<ChainProgram<T, Rule::token>>());
      case Rule::block: return f(TypeOf<ChainProgram<T, Rule::block>>());
      default: return f(TypeOf<ChainProgram<T, Rule::coupled>>());
    }
  });
}

}  // namespace specdec::cuda
