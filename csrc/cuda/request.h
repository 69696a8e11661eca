// What verifying one request takes, be it a chain or a tree.
#pragma once

#include "workspace.h"

namespace specdec::cuda {

template <class T>
SPECDEC_DEVICE Rows<T> rows_of(const Team& team, Which which, const Logits& logits, int64_t elements, int64_t vocab) {
  if constexpr (std::is_same_v<T, Mixed>)
    return {team, which, int(vocab)};
  else
    return {static_cast<const T*>(logits.data) + elements, logits.row_stride, int(vocab)};
}

// As they lie in memory, from an element on.
SPECDEC_DEVICE ProcessedRows plain_rows(const Logits& logits, int64_t elements, int64_t vocab) {
  ProcessedRows rows;
  rows.logits = logits, rows.logits.data = address(logits, elements), rows.vocab = int(vocab);
  return rows;
}

// The log-probability of a token under the plain softmax of a row.
template <class T>
SPECDEC_SELDOM float raw_log_prob(const Team team, const Rows<T> rows, int i, int id) {
  const Together together(kLog2E);
  Mass all;
  for (int span = team.warp(); span * kSpan < rows.vocab; span += kWarps) {
    const Span<T> here{team, rows, i, span};
    Mass own;
    SPECDEC_UNROLL
    for (int u = 0; u < kLoads; ++u) own.top = LargerOrNan()(own.top, here.load(u).top());
    const Weights weight(kLog2E, usable_base(own.top));
    SPECDEC_ROLLED
    for (int u = 0; u < kLoads; ++u) {
      const auto v = here.again(u);
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e) own.sum += weight(v.at(e));
    }
    all = together(all, own);
  }
  all = team.reduce(all, together);
  return all.valid() ? (rows.logit(i, id) - all.top) - logf(all.sum) : NAN;
}

template <class T>
class RequestProgram {
 protected:
  // `cu_rows`: where the rows of requests begin, or null where each has as many. `parents`: of a tree.
  SPECDEC_DEVICE RequestProgram(const Team& team, const Verification& all, const Workspace& work, int request,
                                const int64_t* cu_rows, const int64_t* parents)
      : team_(team),
        all_(all),
        work_(work),
        cu_rows_(cu_rows),
        b_(request),
        rows_(int(all.rows)),
        vocab_(int(all.vocab)),
        parents_(parents) {
    if constexpr (std::is_same_v<T, Mixed>) say_what_is_done_to_rows();
  }

  // Nothing that follows from the request is held in registers: it is asked for again.
  SPECDEC_DEVICE int64_t request() const {
    uint32_t request = uint32_t(b_);
    compute_here(request);
    return int64_t(request);
  }
  SPECDEC_DEVICE Sampling sampling() const { return sampling_of(all_.sampling, int(request())); }
  SPECDEC_DEVICE float draft_scale() const { return all_.draft_stats ? 1.0f : all_.draft_scale(request()); }
  SPECDEC_DEVICE uint64_t seed() const { return uint64_t(given(all_.seed + request())); }
  SPECDEC_DEVICE uint64_t position() const { return uint64_t(given(all_.position + request())); }
  SPECDEC_DEVICE int64_t first_row() const { return cu_rows_ ? given(cu_rows_ + request()) : request() * all_.rows; }
  SPECDEC_DEVICE int64_t target_begin() const {
    return cu_rows_ ? first_row() * all_.target.row_stride : request() * all_.target.request_stride;
  }
  SPECDEC_DEVICE int64_t draft_begin() const { return request() * all_.draft.request_stride; }
  SPECDEC_DEVICE Rows<T> target(Which which = kTargetRows) const {
    return rows_of<T>(team_, which, all_.target, target_begin(), all_.vocab);
  }
  SPECDEC_DEVICE Rows<T> draft() const { return rows_of<T>(team_, kDraftRows, all_.draft, draft_begin(), all_.vocab); }
  SPECDEC_DEVICE void say_what_is_done_to_rows() const {
    if (team_.rank() == 0) {
      ProcessedRows rows = plain_rows(all_.target, target_begin(), all_.vocab);
      team_.memory().rows[kRawRows] = rows;
      rows.mask = mask_of(all_.processing, all_.vocab, first_row());
      rows.adjustments = adjustments_of(all_.processing, b_);
      rows.drafts = all_.tokens, rows.parents = parents_;
      rows.first_draft = b_ * all_.token_strides[0], rows.draft_stride = all_.token_strides[1];
      team_.memory().rows[kTargetRows] = rows;
      rows = plain_rows(all_.draft, draft_begin(), all_.vocab);
      rows.columns = {all_.target_to_draft, int(all_.draft.width)};
      team_.memory().rows[kDraftRows] = rows;
    }
    team_.sync();
  }

  // Whether drafts were drawn from rows of logits.
  SPECDEC_DEVICE bool dense() const { return all_.draft.data != nullptr && draft_scale() != INFINITY; }
  SPECDEC_DEVICE int64_t any_token(int i) const {
    const int64_t at = request() * all_.token_strides[0] + i * all_.token_strides[1];
    return all_.tokens.wide ? given(static_cast<const int64_t*>(all_.tokens.data) + at)
                            : given(static_cast<const int32_t*>(all_.tokens.data) + at);
  }
  SPECDEC_DEVICE bool is_token(int64_t id) const { return id >= 0 && id < vocab_; }
  SPECDEC_DEVICE int token(int i) const { return int(any_token(i)); }
  SPECDEC_DEVICE Noise noise(int i) const { return {seed(), position(), kTarget | uint32_t(i) << 16}; }
  SPECDEC_DEVICE Noise coupled_noise(int depth) const {
    return {seed(), position() + uint64_t(depth), kCoupled | kTokenRace << 8};
  }
  SPECDEC_DEVICE Measure draft_measure() const { return {draft_scale() * kLog2E, Sums::plain}; }

  // Logits that a draft was drawn by: one of an id, and eight from one on.
  SPECDEC_DEVICE float draft_logit(int i, int id) const { return draft().logit(i, id); }
  SPECDEC_DEVICE auto draft_logits(int i, int first) const { return draft().load(i, first); }

  // The distribution that the drafts of row i were drawn from, and whether it is usable: the scalars handed over (a
  // greedy drafter's leave `d`, a point mass, as it is), or the softmax of a row whose table is made.
  SPECDEC_DEVICE bool draft_distribution(int i, const Table& table, Distribution& d) const {
    if (all_.draft_stats) {
      const float* stats = all_.draft_stats + 3 * (request() * all_.draft_rows + i);
      const float scale = given(stats);
      if (scale != INFINITY) d = {scale, given(stats + 1), 0.0f, given(stats + 2), -1};
      return true;
    }
    const Mass mass = mass_of(team_, table, draft_scale() * kLog2E);
    d = {draft_scale(), -INFINITY, mass.top, logf(mass.sum), -1};
    if (is_steep(draft_scale(), mass.top)) d.scale = 0.0f, d.cutoff = mass.top;
    return mass.valid();
  }

  SPECDEC_DEVICE float raw_logprob(int i, int id) const { return raw_log_prob<T>(team_, target(kRawRows), i, id); }

  // The log-probabilities at place i of the results, of a token and the row that it follows, of which `state` has what
  // was found. No row: the path has ended before.
  template <class State>
  SPECDEC_DEVICE void write_logprobs(int i, int row, int id, const State* state) const {
    if (all_.out_logprobs == nullptr) return;
    const int64_t at = request() * rows_ + i;
    const float raw = row >= 0 ? raw_logprob(row, id) : NAN;
    if (team_.rank() != 0) return;
    float score = NAN;
    if (row >= 0) {
      const State found = fresh(state);
      if (found.valid) score = float(found.target.log_prob(target().logit(row, id), id));
    }
    all_.out_logprobs[at] = score, all_.out_raw_logprobs[at] = raw;
  }

  // --- which rows the path is known to need -------------------------------------------------------------------------
  //
  // A row is settled once it was judged, or once the path is known to pass it by. A request has a bit for each row in
  // words, and whoever settles the last ones knows that the path is complete, and decides. That is as soon as its last
  // row was judged: rows behind the end of a chain, or beside the path through a tree, are passed by.
  SPECDEC_DEVICE int words() const { return (rows_ + 31) / 32; }
  SPECDEC_DEVICE uint32_t* counters() const { return work_.counters + request() * (rows_ + 2 + words()); }
  SPECDEC_DEVICE uint32_t* rows_done() const { return counters() + rows_; }
  SPECDEC_DEVICE uint32_t* rows_settled() const { return counters() + rows_ + 1; }
  SPECDEC_DEVICE uint32_t* settled_bits() const { return counters() + rows_ + 2; }
  SPECDEC_DEVICE bool is_settled(int row) const { return (glance(settled_bits() + row / 32) >> row % 32 & 1) != 0; }

  // Settles the rows of which `settles(row)` is true. Whether those were the last of `live`.
  template <class F>
  SPECDEC_DEVICE bool settle(int live, const F& settles) const {
    bool last = false;
    int more = 0;
    team_.sync();  // what was judged is written
    SPECDEC_ROLLED
    for (int word = team_.warp(); 32 * word < live; word += kWarps) {
      const uint32_t bits = team_.bits([&](int bit) { return 32 * word + bit < live && settles(32 * word + bit); });
      if (team_.lane() != 0 || bits == 0) continue;
      const uint32_t before = set_bits(settled_bits() + word, bits);
      const uint32_t all = live >= 32 ? ~0u : (1u << live) - 1;
      last = before != all && (before | bits) == all;
      more += count_bits(bits & ~before);
    }
    if (live > 32) {  // no word alone tells
      more = team_.reduce(more, Plus());
      last = team_.rank() == 0 && more > 0 && int(add_to(rows_settled(), uint32_t(more))) + more == live;
    }
    return team_.of_first(last) != 0;
  }

  // Once all blocks of a row have come. The last row of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave(int live) const {
    if (team_.rank() != kThreads - 1) return;  // not who has most to do
    if (come_to(rows_done(), uint32_t(live - 1)) != uint32_t(live - 1)) return;
    acquire();
    put(rows_settled(), 0u);
    SPECDEC_ROLLED
    for (int word = 0; word < words(); ++word) put(settled_bits() + word, 0u);
  }

  // One row, by the blocks that share it. Rows come after those whose outcome decides on them, so where blocks start in
  // that order, those of rows that the path is known to pass by find that out and read nothing. `live()` rows there
  // are, known once the row was measured. The last block of the row judges it, `judge()` giving what tells which others
  // that settles; and whoever completes the path decides.
  template <class L, class F, class G, class H>
  SPECDEC_DEVICE void run_row(int row, const L& live, const F& measure, const G& judge, const H& decide) const {
    // Asked once for all threads: it may change meanwhile.
    if (!work_.in_waves || !team_.any(is_settled(row))) measure();
    if (row >= live()) return;
    const int code = when_all_came(team_, counters() + row, work_.slices, [&] { return is_settled(row) ? 2 : 1; });
    if (code == 0) return;
    bool decides = false;
    if (code == 1) {
      const auto settles = judge();
      decides = settle(live(), [&](int other) { return other == row || settles(other); });
    }
    leave(live());
    if (decides) decide();
  }

  const Team& team_;
  const Verification& all_;
  const Workspace& work_;
  const int64_t* const cu_rows_;
  const int b_, rows_, vocab_;
  const int64_t* const parents_;
};

}  // namespace specdec::cuda
