// What rejected drafts leave of a target's distribution in one row: its mass, and draws from it. A chain's row is that
// of a tree's node with one child.
#pragma once

#include "crew.h"

namespace specdec::cuda {

// (target - share * draft)+ of an id, where the draft was divided by a factor; of a drafter that is certain of its
// token, all of the target. Of the rejected tokens themselves something else may be left: those are set apart.
struct Residual {
  Probabilities target, draft;
  bool certain;

  SPECDEC_DEVICE float operator()(float target_logit, float draft_logit, float share = 1.0f) const {
    const float prob = target(target_logit);
    if (certain) return prob;
    const float left = prob - draft(draft_logit) * share;
    return left > 0.0f ? left : 0.0f;  // nothing where the draft is no number
  }
};

// The ids of a span that a lane has, a bit each.
struct LaneBits {
  uint32_t words[kLoads * kElements / 32] = {};

  // Which one an id is; -1 where another lane has it, or it lies elsewhere.
  SPECDEC_DEVICE static int bit_of(const Team& team, int span, int id) {
    const int offset = id - span * kSpan;
    if (offset < 0 || offset >= kSpan || offset / kElements % kLanes != team.lane()) return -1;
    return offset / (kElements * kLanes) * kElements + offset % kElements;
  }
  // Adds a bit; whether it was there.
  SPECDEC_DEVICE bool add(int bit) {
    bool was = false;
    SPECDEC_UNROLL
    for (int word = 0; word < int(sizeof(words) / 4); ++word) {
      if (bit / 32 != word) continue;
      was = (words[word] >> bit % 32 & 1) != 0;
      words[word] |= 1u << bit % 32;
    }
    return was;
  }
  SPECDEC_DEVICE bool has(int u, int e) const { return (words[u / 4] >> (u % 4 * kElements + e) & 1) != 0; }
};

template <class T>
class ResidualProgram : protected RequestProgram<T> {
  using Base = RequestProgram<T>;

 protected:
  using Base::Base, Base::team_, Base::vocab_, Base::work_;
  using Base::draft_logit, Base::draft_logits, Base::noise, Base::target;

  // The sums over this warp's spans of row i of f(target's logit, draft's), either of which may not be asked for. But
  // of what `set_apart(span, bits)` puts into its bits that says what this lane has. Left where total_of finds them.
  template <bool kTarget, class F, class G>
  SPECDEC_DEVICE void sum_spans(const Crew& crew, int i, bool with_draft, float* sums, const F& f,
                                const G& set_apart) const {
    for (int span = crew.first_span(); span < work_.spans; span += crew.stride()) {
      LaneBits apart;
      float mass = set_apart(span, apart);
      SPECDEC_UNROLL_BY(2)
      for (int u = 0; u < kLoads; ++u) {
        const int first = span * kSpan + load_offset(team_, u);
        typename Rows<T>::Loaded x, y;
        if (kTarget) x = target().load(i, first);
        if (with_draft) y = draft_logits(i, first);
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) {
          const float left = f(kTarget ? x.at(e) : 0.0f, with_draft ? y.at(e) : 0.0f);
          mass += apart.has(u, e) ? 0.0f : left;
        }
      }
      mass = team_.in_warp(mass, Plus());
      if (team_.lane() == 0) put(sums + span, mass);
    }
  }

  // The token that ends the step in row i, by the two-level race: of what rejections left, and of the target's own
  // probabilities where that is nothing, or nothing was rejected. `set_apart(first, w)` sets the weights of what is set
  // apart among four ids.
  template <class F>
  SPECDEC_DEVICE int draw_after(int i, bool filtered, const Table& table, const Residual& residual, bool rejected,
                                const F& set_apart) const {
    for (;;) {
      const int drawn = draw(team_, residual.target, filtered, table, noise(i), [&](int first, float* w) {
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int id = first + k;
          const float x = id < vocab_ ? target().logit(i, id) : -INFINITY;
          const float y = id < vocab_ && rejected && !residual.certain ? draft_logit(i, id) : 0.0f;
          w[k] = id >= vocab_ ? 0.0f : rejected ? residual(x, y) : residual.target(x);
        }
        if (rejected) set_apart(first, w);
      });
      if (drawn != kNobody || !rejected) return drawn;
      rejected = false;
    }
  }
};

}  // namespace specdec::cuda
