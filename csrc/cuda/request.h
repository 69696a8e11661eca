// What verifying one request takes, be it a chain or a tree.
#pragma once

#include "workspace.h"

namespace specdec::cuda {

template <bool P>
class RequestProgram {
 protected:
  // `elements`: where the rows of the request begin; `first`: its first row among all masks.
  SPECDEC_DEVICE RequestProgram(const Team& team, const Verification& all, const Workspace& work, int64_t request,
                                int64_t elements, int64_t first)
      : team_(team),
        all_(all),
        work_(work),
        b_(request),
        sampling_(sampling_of(all.sampling, request)),
        draft_scale_(all.draft_stats ? 1.0f : all.draft_scale(request)) {
    seed_ = uint64_t(all.seed[b_]), position_ = uint64_t(all.position[b_]);
    target_.logits = address(all.target, elements);
    target_.dtype = all.target.dtype, target_.stride = all.target.row_stride, target_.vocab = all.vocab;
    target_.drafts = all.tokens;
    target_.first_draft = b_ * all.token_strides[0], target_.draft_stride = all.token_strides[1];
    if constexpr (P) target_.mask = mask_of(all.processing, all.vocab, first);
    if constexpr (P) target_.edits = edits_of(all.processing, b_);
    if (!dense()) return;
    draft_.logits = address(all.draft, b_ * all.draft.request_stride);
    draft_.dtype = all.draft.dtype, draft_.stride = all.draft.row_stride, draft_.vocab = all.vocab;
  }

  // Whether drafts were drawn from rows of logits.
  SPECDEC_DEVICE bool dense() const { return all_.draft.data != nullptr && draft_scale_ != INFINITY; }
  SPECDEC_DEVICE int64_t token(int64_t i) const { return all_.tokens[target_.first_draft + i * target_.draft_stride]; }
  SPECDEC_DEVICE Noise noise(int64_t i) const { return {seed_, position_, kTarget | uint32_t(i) << 16}; }

  // The law that the drafts of row i were drawn from, and whether it is usable: the scalars handed over (a greedy
  // drafter's leave `law`, a point mass, as it is), or the softmax of a row whose table is made.
  SPECDEC_DEVICE bool look_at_draft(int64_t i, const Table& table, bool measured, Law& law) const {
    if (all_.draft_stats) {
      const float* stats = all_.draft_stats + 3 * (b_ * all_.draft_rows + i);
      if (stats[0] != INFINITY) law = {stats[0], stats[1], double(stats[2]), -1, 0};
      return true;
    }
    if (!measured) measure_row<false>(team_, draft_, i, draft_scale_, table);
    const Summary found = summary(team_, draft_, draft_scale_, table, {}, false);
    law = law_from(found, draft_scale_, -INFINITY);
    return found.valid;
  }

  // Of a token under the plain softmax of row i.
  SPECDEC_DEVICE float raw_logprob(int64_t i, int64_t id, const Table& table) const {
    Rows rows = target_;
    measure_row<false>(team_, rows, i, 1.0f, table);
    const Summary raw = summary(team_, rows, 1.0f, table, {}, false);
    return raw.valid ? float(log_prob<false>(rows, i, law_from(raw, 1.0f, -INFINITY), id)) : NAN;
  }

  // The winner of the tile race of weights that are nowhere above a row's probabilities, such as a residual; kNobody
  // where there are none. `sum(first)`: of this thread's ids of a tile. The row's own tiles, which are in its table,
  // bound these: none can arrive before its bound does. So each group looks at its tiles in the order of their bounds
  // until none of the others can win: exact, and about 1 / (what is left of the probability) of them. `bounds`:
  // scratch.
  template <class F>
  SPECDEC_DEVICE int64_t race_below(const Law& law, const Table& table, float* bounds, const Noise& noise,
                                    const F& sum) const {
    const int64_t groups = team_.size() / kGroup, tiles = tiles_of(all_.vocab);
    const int64_t own = team_.rank() / kGroup + team_.rank() % kGroup * groups;  // of this thread, every size()-th
    for (int64_t tile = own; tile < tiles; tile += team_.size()) {
      Arrived bound;
      const float largest = fresh(table.maxima + tile);
      const float share = float(double(law.scale) * double(largest) - law.logsumexp);
      if (!(largest < law.cutoff))
        take_part(bound, exponential(noise, tile), fresh(table.sums + tile) * expf(share), tile);
      bounds[tile] = bound.time;
    }
    Arrived first;
    for (;;) {
      Arrived next;
      for (int64_t tile = own; tile < tiles; tile += team_.size())
        if (bounds[tile] < INFINITY) next = Earlier()(next, {bounds[tile], 0.0f, tile});
      next = team_.in_group(next, Earlier());
      // The bounds and the weights are rounded apart: leave room for that.
      const bool looking = next.id != kNobody && next.time * 0.9999f < first.time;
      if (!team_.any_in_warp(looking)) break;
      if (looking && next.id % team_.size() == own % team_.size()) bounds[next.id] = INFINITY;
      const float weight = team_.in_group(looking ? sum(own_ids(team_, next.id)) : 0.0f, Plus());
      if (looking) take_part(first, exponential(noise, next.id), weight, next.id);
    }
    return team_.reduce(first, Earlier()).id;
  }

  // The probabilities of a law, divided by `factor`.
  SPECDEC_DEVICE static Probabilities divided(Law law, double factor) {
    law.logsumexp += log(factor);
    return Probabilities(law);
  }

  const Team& team_;
  const Verification& all_;
  const Workspace& work_;
  const int64_t b_;
  const Sampling sampling_;
  const float draft_scale_;  // of drafts that came without stats
  uint64_t seed_, position_;
  Rows target_, draft_;
};

}  // namespace specdec::cuda
