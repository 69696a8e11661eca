// `verify_chain`.
//
// Rules token and coupled: rows come in the order of the drafts, so where blocks start in that order, those of rows
// behind a draft that was not accepted find that out and read nothing. The last block of a row judges it, and whoever
// completes the path decides. Rule block: a crew, which reads all rows.
#pragma once

#include "crew.h"

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
class ChainProgram : RequestProgram<T> {
  using Base = RequestProgram<T>;
  using Base::all_, Base::b_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::dense, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::is_settled, Base::is_token, Base::leave, Base::noise,
      Base::position, Base::raw_logprob, Base::sampling, Base::seed, Base::settle, Base::target, Base::token;

 public:
  SPECDEC_DEVICE ChainProgram(const Team& team, const VerifyChain& op, const Workspace& work, const Part& part)
      : Base(team, op.common, work, part.request, op.cu_rows),
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
    bool needed = true;
    if (work_.in_waves) {
      drafted_ = count_drafts();
      if (row_ > drafted_) return;
      needed = !team_.any(is_settled(row_));  // asked once for all threads: it may change meanwhile
    }
    if (needed) measure_slices();
    if (row_ > drafted_) return;
    const int code = when_all_came(team_, counters() + row_, work_.slices, [&] { return is_settled(row_) ? 2 : 1; });
    if (code == 0) return;
    bool decides = false;
    if (code == 1) {
      const bool ends = !judge(row_) && !op_.independent;
      decides = settle(drafted_ + 1, [&](int row) { return row == row_ || (ends && row > row_); });
    }
    leave(drafted_ + 1);
    if (decides) decide(end_of_path(), drafted_);
  }

  // All rows are measured, then judged, each by a block of the crew; then the residuals are, and one block decides.
  SPECDEC_DEVICE void run_as_crew() {
    Crew crew(team_, counters(), slice_, work_.slices);
    drafted_ = count_drafts();
    const int stride = crew.stride(), rest = work_.spans % stride;
    int first = crew.first_span();
    for (int i = 0; i <= drafted_; ++i) {
      measure<false>(team_, target(), i, first, work_.spans, stride, sampling().measure(vocab_), {}, target_table(i),
                     [] {});
      first = (first + stride - rest) % stride;  // who had less of this row has more of the next
      if (!measures_draft() || i == drafted_) continue;
      measure<false>(team_, draft(), i, first, work_.spans, stride, draft_measure(), {}, draft_table(i), [] {});
      first = (first + stride - rest) % stride;
    }
    crew.meet();
    for (int i = crew.block(); i <= drafted_; i += crew.blocks()) judge(i);
    crew.meet();
    verify_block_rule(crew);
    crew.leave();
  }

  SPECDEC_DEVICE Table target_table(int i) const { return work_.table(2 * (int64_t(b_) * rows_ + i)); }
  SPECDEC_DEVICE Table draft_table(int i) const { return work_.table(2 * (int64_t(b_) * rows_ + i) + 1); }
  SPECDEC_DEVICE Judged* place(int i) const { return static_cast<Judged*>(work_.places) + int64_t(b_) * rows_ + i; }

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
    const Judged last = fresh(place(kept));
    const bool rejected = kept < usable && last.tested;
    int emitted = last.drawn;
    if constexpr (kRule != Rule::coupled)
      if (last.target.argmax < 0) emitted = draw_after(kept, last, path_prob, rejected);
    int independent = 0;
    for (int i = team_.rank(); op_.independent && i < drafted_; i += kThreads) independent += fresh(place(i)).passed;
    if (op_.independent) independent = team_.reduce(independent, Plus());
    if (team_.rank() == 0) {
      all_.out_accepted[b_] = kept;
      all_.out_valid[b_] = last.valid && (kept == drafted_ || last.tested);
      op_.out_counters[2 * b_] = drafted_;
      op_.out_counters[2 * b_ + 1] = op_.independent ? independent : -1;
    }
    for (int i = team_.rank(); i < rows_; i += kThreads)
      all_.out_tokens[int64_t(b_) * rows_ + i] = i < kept ? token(i) : i == kept ? emitted : -1;
    if (all_.out_logprobs) write_logprobs(kept, emitted);
  }

  // Rules token and coupled: the first row whose draft did not pass, or that has none.
  SPECDEC_DEVICE int end_of_path() const {
    int end = drafted_;
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
      if (usable > 0 && path_prob < 1.0) sum_residual(crew, usable, Residual(row, path_prob));
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

  // What is left of the target's probability of an id, (target - draft / path_prob)+.
  struct Residual {
    Probabilities target, draft;
    int certain;  // the draft's token where it is a point mass, else -1

    SPECDEC_DEVICE Residual(const Judged& row, double path_prob)
        : target(row.target), draft(row.draft, path_prob), certain(row.draft.argmax) {}
    SPECDEC_DEVICE float operator()(float target_logit, float draft_logit, int id) const {
      const float prob = target(target_logit);
      if (certain >= 0) return id == certain ? 0.0f : prob;
      const float left = prob - draft(draft_logit);
      return left > 0.0f ? left : 0.0f;  // nothing where the draft is not a number
    }
  };

  // The masses of what is left of row i, of this warp's spans.
  SPECDEC_DEVICE void sum_residual(const Crew& crew, int i, const Residual& residual) const {
    for (int span = crew.first_span(); span < work_.spans; span += crew.stride()) {
      Span<T> x, y;
      x.load(team_, target(), i, span);
      if (residual.certain < 0) y.load(team_, draft(), i, span);
      float mass = 0.0f;
      SPECDEC_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        const int id = span * kSpan + load_offset(team_, u);
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e)
          mass += residual(x.v[u].at(e), residual.certain < 0 ? y.v[u].at(e) : 0.0f, id + e);
      }
      mass = team_.in_warp(mass, Plus());
      if (team_.lane() == 0) put(span_sums(target_table(i), 0) + span, mass);
    }
  }

  // The token that ends the step in row i, by the two-level race: of what a rejection left, and of the target's own
  // probabilities where that is nothing, or nothing was rejected.
  SPECDEC_DEVICE int draw_after(int i, const Judged& row, double path_prob, bool rejected) const {
    const Residual residual(row, path_prob);
    for (;;) {
      const int drawn = draw(team_, row.target, target_table(i), noise(i), [&](int first, float* w) {
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int id = first + k;
          if (id >= vocab_)
            w[k] = 0.0f;
          else if (!rejected)
            w[k] = residual.target(target().logit(i, id));
          else
            w[k] = residual(target().logit(i, id), residual.certain >= 0 ? 0.0f : draft_logit(i, id), id);
        }
      });
      if (drawn != kNobody || !rejected) return drawn;
      rejected = false;
    }
  }

  SPECDEC_DEVICE void write_logprobs(int kept, int emitted) const {
    for (int i = 0; i < rows_; ++i) {
      float score = NAN, raw_score = NAN;
      if (i <= kept) {
        const Judged row = fresh(place(i));
        const int id = i < kept ? token(i) : emitted;
        if (row.valid) score = float(row.target.log_prob(target().logit(i, id), id));
        raw_score = raw_logprob(i, id);
      }
      const int64_t at = int64_t(b_) * rows_ + i;
      if (team_.rank() == 0) all_.out_logprobs[at] = score, all_.out_raw_logprobs[at] = raw_score;
    }
  }

  const VerifyChain& op_;
  const int row_, slice_, room_;
  int drafted_ = 0;
};

}  // namespace specdec::cuda
