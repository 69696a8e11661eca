// `verify_chain`, by many teams a request. Rows come in the order of the drafts, so where teams start in that order,
// those of rows behind a draft that was not accepted find that out and read nothing. The last team of a row judges it,
// and the last row of a request to be judged decides.
#pragma once

#include "request.h"

namespace specdec::cuda {

// All that a rule asks of a row once it was judged.
struct Judged {
  Law target, draft;
  double prob = 0.0, draft_prob = 1.0;  // of the draft, under target and draft
  double reach = 1.0;                   // rule block
  int64_t drawn = -1;                   // rule coupled
  bool valid = false;
  bool tested = false;  // there is a draft, and its law is usable
  bool passed = false;  // on its own
};

// One request of `verify_chain`. P: whether logits are processed.
template <Rule kRule, bool P>
class ChainProgram : RequestProgram<P> {
  using Base = RequestProgram<P>;
  using Base::all_, Base::b_, Base::draft_, Base::draft_scale_, Base::position_, Base::sampling_, Base::seed_,
      Base::target_, Base::team_;
  using Base::dense, Base::divided, Base::look_at_draft, Base::noise, Base::race_below, Base::raw_logprob, Base::token,
      Base::work_;

 public:
  // program = (row * slices + slice) * requests + request: first rows first.
  SPECDEC_DEVICE ChainProgram(const Team& team, const VerifyChain& op, const Workspace& work, int64_t program)
      : ChainProgram(team, op, work, program % op.common.batch, program / op.common.batch) {}

  SPECDEC_DEVICE void run() {
    if (row_ > drafted_) return;
    // Of every row the teams that came; rows that were judged; `stopped` is the number of rows from the last that are
    // behind the earliest known stop.
    int32_t* arrived = work_.counters + b_ * (all_.rows + 2);
    int32_t *judged = arrived + all_.rows, *stopped = judged + 1;
    const auto from_last = int32_t(all_.rows - row_);
    // Asked once for all threads: others may stop the request meanwhile.
    const bool needed = team_.reduce(fresh(stopped), Larger()) <= from_last;
    if (needed) {
      measure_slice<P>(team_, target_, row_, sampling_.finite_scale(), part_, work_.slices, target_table(row_));
      if (needs_draft())
        measure_slice<false>(team_, draft_, row_, draft_scale_, part_, work_.slices, draft_table(row_));
    }
    if (!team_.last_to_arrive(arrived + row_, int32_t(work_.slices - 1))) return;
    // Where a team of this row read nothing, the stop it saw can be seen here.
    if (team_.reduce(fresh(stopped), Larger()) <= from_last) {
      const bool passed = judge();
      if (kRule != Rule::block && !op_.independent && !passed) team_.raise(stopped, from_last);
    }
    if (!team_.last_to_arrive(judged, int32_t(drafted_))) return;
    decide();
    if (team_.rank() != 0) return;
    for (int64_t i = 0; i <= drafted_; ++i) arrived[i] = 0;
    *judged = *stopped = 0;
  }

 private:
  SPECDEC_DEVICE ChainProgram(const Team& team, const VerifyChain& op, const Workspace& work, int64_t b, int64_t slot)
      : ChainProgram(team, op, work, b, slot, op.cu_rows ? op.cu_rows[b] : b * op.common.rows) {}

  // `first`: of the rows of all requests.
  SPECDEC_DEVICE ChainProgram(const Team& team, const VerifyChain& op, const Workspace& work, int64_t b, int64_t slot,
                              int64_t first)
      : Base(team, op.common, work, b,
             op.cu_rows ? first * op.common.target.row_stride : b * op.common.target.request_stride, first),
        op_(op),
        row_(slot / work.slices),
        part_(slot % work.slices),
        drafted_(count_drafts()) {}

  // Whether the row of the draft has to be measured.
  SPECDEC_DEVICE bool needs_draft() const {
    return kRule != Rule::coupled && dense() && all_.draft_stats == nullptr && row_ < drafted_ && !sampling_.greedy();
  }

  SPECDEC_DEVICE Table target_table(int64_t i) const { return work_.table(2 * (b_ * all_.rows + i)); }
  SPECDEC_DEVICE Table draft_table(int64_t i) const { return work_.table(2 * (b_ * all_.rows + i) + 1); }
  SPECDEC_DEVICE Judged& place(int64_t i) const { return static_cast<Judged*>(work_.places)[b_ * all_.rows + i]; }

  // -1, or an id that is none, ends the drafts.
  SPECDEC_DEVICE int64_t count_drafts() const {
    const int64_t most = op_.room(b_);
    int64_t count = 0;
    while (count < most && token(count) >= 0 && token(count) < all_.vocab) ++count;
    return count;
  }

  // Looks at this row, whose tables are made, and remembers what a rule asks of it. Whether its draft passes on its
  // own, by coin or, coupled, by being what is drawn.
  SPECDEC_DEVICE bool judge() const {
    const int64_t i = row_, id = i < drafted_ ? token(i) : -1;
    const LawOfRow found = law_of<P>(team_, target_, i, sampling_, target_table(i), noise(i), kRule != Rule::coupled);
    Judged row;
    row.target = found.law;
    row.valid = found.valid;
    row.tested = id >= 0 && found.valid;
    row.drawn = found.law.argmax;
    if constexpr (kRule == Rule::coupled) {
      if (row.drawn < 0) row.drawn = flat_race<P>(team_, target_, i, found.law, seed_, position_ + uint64_t(i));
      row.passed = row.tested && id == row.drawn;
    } else {
      // A greedy target accepts its argmax and emits its argmax: there no law of the draft matters.
      row.draft.argmax = id;
      if (dense() && row.tested && found.law.argmax < 0) {
        row.tested = look_at_draft(i, draft_table(i), true, row.draft);
        row.draft_prob = row.draft.argmax < 0 ? exp(log_prob<false>(draft_, i, row.draft, id)) : 1.0;
        row.tested = row.tested && row.draft_prob < INFINITY;
      }
      if (row.tested) row.prob = exp(log_prob<P>(target_, i, found.law, id));
      // Strict: a token the target gives probability 0 is never accepted, even by coin 0.
      row.passed = row.tested && coin(seed_, position_, i) * row.draft_prob < row.prob;
    }
    if (team_.rank() == 0) place(i) = row;
    return row.passed;
  }

  SPECDEC_DEVICE void decide() {
    const int64_t kept = kRule == Rule::block ? all_together() : one_by_one();
    const Judged& last = place(kept);
    const bool rejected = kept < (kRule == Rule::block ? looked_at_ : drafted_) && last.tested;
    int64_t emitted = last.drawn;
    if constexpr (kRule != Rule::coupled) emitted = emit(kept, last, rejected);
    if (team_.rank() == 0) {
      all_.out_accepted[b_] = int32_t(kept);
      all_.out_valid[b_] = last.valid && (kept == drafted_ || last.tested);
      op_.out_counters[2 * b_] = int32_t(drafted_);
      op_.out_counters[2 * b_ + 1] = op_.independent ? count_independent() : -1;
    }
    for (int64_t i = 0; i < all_.rows; ++i) write(i, kept, emitted);
  }

  SPECDEC_DEVICE int32_t count_independent() const {
    int32_t count = 0;
    for (int64_t i = 0; i < drafted_; ++i) count += place(i).passed;
    return count;
  }

  // Rules token and coupled: how many drafts are kept.
  SPECDEC_DEVICE int64_t one_by_one() const {
    int64_t kept = 0;
    while (kept < drafted_ && place(kept).passed) ++kept;
    return kept;
  }

  // Rule block (Sun et al., arXiv:2403.10444): the longest prefix that its coin keeps, looked at from the end, so that
  // a residual's mass is only taken of rows behind it. The names follow algorithms.md, 2.
  SPECDEC_DEVICE int64_t all_together() {
    double reach = 1.0;
    for (looked_at_ = 0; looked_at_ < drafted_ && reach > 0.0; ++looked_at_) {  // once 0, it stays 0
      Judged& row = place(looked_at_);
      if (team_.rank() == 0) row.reach = reach;
      if (!row.tested) break;
      // What the target excludes is never accepted, whatever the draft was declared to be: 0 / 0 is 0.
      reach = row.prob > 0.0 ? fmin(1.0, reach * row.prob / row.draft_prob) : 0.0;
    }
    team_.sync();  // what one thread wrote, all read
    int64_t kept = looked_at_;
    for (; kept > 0; --kept) {
      double threshold = reach;
      if (kept < looked_at_) {
        const Judged& row = place(kept);
        const double left = row.reach < 1.0 ? row.reach * residual_mass(kept, row) : 1.0;
        threshold = row.reach < 1.0 ? left / (left + 1.0 - row.reach) : 1.0;
      }
      if (coin(seed_, position_, kept - 1) < threshold) break;
    }
    return kept;
  }

  // The sum of what is left of the target's probabilities of this thread's ids, (target - draft / reach)+.
  SPECDEC_DEVICE float residuals(int64_t i, const Judged& row, const Probabilities& target, const Probabilities& draft,
                                 int64_t first) const {
    float x[kElements], y[kElements], sum = 0.0f;
    load<P>(target_, i, first, x);
    const bool certain = row.draft.argmax >= 0;
    if (!certain) load<false>(draft_, i, first, y);
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) sum += residual(row, target, draft, x[e], certain ? 0.0f : y[e], first + e);
    return sum;
  }

  SPECDEC_DEVICE static float residual(const Judged& row, const Probabilities& target, const Probabilities& draft,
                                       float target_logit, float draft_logit, int64_t id) {
    const float prob = target(target_logit);
    if (row.draft.argmax >= 0) return id == row.draft.argmax ? 0.0f : prob;
    const float left = prob - draft(draft_logit);
    return left > 0.0f ? left : 0.0f;  // nothing where the draft is not a number
  }

  SPECDEC_PASS double residual_mass(int64_t i, const Judged& row) const {
    const Probabilities target(row.target), draft = divided(row.draft, row.reach);
    double mass = 0.0;
    for_tiles<P ? 1 : kAhead>(team_, 0, tiles_of(all_.vocab), [&](int64_t tile, bool there) {
      if (there) mass += double(residuals(i, row, target, draft, own_ids(team_, tile)));
    });
    return team_.reduce(mass, Plus());
  }

  // The token that ends the step in row i.
  SPECDEC_DEVICE int64_t emit(int64_t i, const Judged& row, bool rejected) const {
    if (row.target.argmax >= 0) return row.target.argmax;
    int64_t emitted = rejected ? draw_residual(i, row) : kNobody;
    return emitted == kNobody ? draw_from_row<P>(team_, target_, i, row.target, noise(i)) : emitted;
  }

  // By the two-level race; kNobody where nothing is left.
  SPECDEC_PASS int64_t draw_residual(int64_t i, const Judged& row) const {
    const Probabilities target(row.target), draft = divided(row.draft, row.reach);
    float* const bounds = draft_table(i).maxima;  // no longer asked for
    const int64_t tile = race_below(row.target, target_table(i), bounds, noise(i),
                                    [&](int64_t first) { return residuals(i, row, target, draft, first); });
    if (tile == kNobody) return kNobody;
    return draw_inside(team_, tile, all_.vocab, noise(i), [&](int64_t id) {
      const float draft_logit = row.draft.argmax >= 0 ? 0.0f : logit<false>(draft_, i, id);
      return residual(row, target, draft, logit<P>(target_, i, id), draft_logit, id);
    });
  }

  // Place i of the results.
  SPECDEC_DEVICE void write(int64_t i, int64_t kept, int64_t emitted) const {
    const int64_t at = b_ * all_.rows + i, id = i < kept ? token(i) : i == kept ? emitted : -1;
    float score = NAN, raw_score = NAN;
    if (all_.out_logprobs && i <= kept) {
      const Judged& row = place(i);
      if (row.valid) score = float(log_prob<P>(target_, i, row.target, id));
      raw_score = raw_logprob(i, id, target_table(i));
    }
    if (team_.rank() != 0) return;
    all_.out_tokens[at] = id;
    if (all_.out_logprobs) all_.out_logprobs[at] = score, all_.out_raw_logprobs[at] = raw_score;
  }

  const VerifyChain& op_;
  const int64_t row_, part_, drafted_;
  int64_t looked_at_ = 0;
};

}  // namespace specdec::cuda
