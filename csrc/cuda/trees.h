// `verify_tree`. Semantics: specdec_kernels/ops/tree_rules.py. Either several teams measure the rows of all nodes, and
// the last of a request to finish decides; or one team a request measures a row when it comes to it.
#pragma once

#include "request.h"

namespace specdec::cuda {

// What is known of a node that was come to. Rejecting its children one after the other leaves, up to a factor,
// (target - draft / factor)+ with one number; but siblings drawn without replacement were not drawn from what was
// rejected before them, so a rejected token has a factor of its own.
struct Node {
  Law target, draft;
  double reach = 1.0;    // the chance that it is come to at all, rule traversal
  double mass = 1.0;     // of what the rejected children leave
  double drafted = 0.0;  // the draft's probability of them
  double factor = INFINITY;
  double own_factor = INFINITY;  // as a rejected child
  int64_t last = 0;              // the last child that was looked at
  bool settled = true;           // mass and reach are up to date
};

template <bool P>
class TreeProgram : RequestProgram<P> {
  using Base = RequestProgram<P>;
  using Base::all_, Base::b_, Base::draft_, Base::draft_scale_, Base::position_, Base::sampling_, Base::seed_,
      Base::target_, Base::team_;
  using Base::dense, Base::divided, Base::look_at_draft, Base::noise, Base::race_below, Base::raw_logprob, Base::token,
      Base::work_;

 public:
  // program = (node * slices + slice) * requests + request; just the request where rows are not measured ahead.
  SPECDEC_DEVICE TreeProgram(const Team& team, const VerifyTree& op, const Workspace& work, int64_t program)
      : Base(team, op.common, work, program % op.common.batch,
             program % op.common.batch * op.common.target.request_stride, program % op.common.batch * op.common.rows),
        op_(op),
        parents_(op.parents + b_ * op.common.rows),
        live_(live_nodes(parents_, op.common.rows)),
        node_(program / op.common.batch / work.slices),
        part_(program / op.common.batch % work.slices) {
    target_.parents = parents_;
  }

  SPECDEC_DEVICE void run() {
    if (work_.ahead && !measure_ahead()) return;
    write(walks() ? walk() : descend());
  }

 private:
  struct Ended {
    int64_t node, emitted;
    bool valid;
  };

  SPECDEC_DEVICE bool walks() const { return op_.rule == TreeRule::walk || op_.rule == TreeRule::coupled; }

  // A slice of one node's rows. Whether this team is the last of its request.
  SPECDEC_DEVICE bool measure_ahead() const {
    const int64_t there = live_ > 0 ? live_ : 1;  // the first row is asked for even where there is no tree
    if (node_ >= there) return false;
    measure_slice<P>(team_, target_, node_, sampling_.finite_scale(), part_, work_.slices, target_table(node_));
    const bool drafts = !walks() && dense() && all_.draft_stats == nullptr && next_child(node_, node_) < live_;
    if (drafts && !sampling_.greedy())
      measure_slice<false>(team_, draft_, node_, draft_scale_, part_, work_.slices, draft_table(node_));
    if (!team_.last_to_arrive(work_.counters + b_, int32_t(there * work_.slices - 1))) return false;
    if (team_.rank() == 0) work_.counters[b_] = 0;
    return true;
  }

  SPECDEC_DEVICE int64_t place(int64_t node) const { return 2 * (work_.ahead ? b_ * all_.rows + node : b_); }
  SPECDEC_DEVICE Table target_table(int64_t node) const { return work_.table(place(node)); }
  SPECDEC_DEVICE Table draft_table(int64_t node) const { return work_.table(place(node) + 1); }
  SPECDEC_DEVICE Node& at(int64_t node) const { return static_cast<Node*>(work_.places)[b_ * all_.rows + node]; }

  // The first child of a node behind `after`; the number of nodes if there is none. A node whose token is none is no
  // child.
  SPECDEC_DEVICE int64_t next_child(int64_t node, int64_t after) const {
    int64_t child = after + 1;
    while (child < live_ && !(parents_[child] == node && token(child) >= 0 && token(child) < all_.vocab)) ++child;
    return child < live_ ? child : live_;
  }

  SPECDEC_DEVICE int64_t depth_of(int64_t node) const {
    int64_t depth = 0;
    for (; node > 0; node = parents_[node]) ++depth;
    return depth;
  }

  SPECDEC_PASS LawOfRow look(int64_t node, bool race, bool measured) const {
    if (!measured) measure_row<P>(team_, target_, node, sampling_.finite_scale(), target_table(node));
    return law_of<P>(team_, target_, node, sampling_, target_table(node), noise(node), race);
  }

  SPECDEC_DEVICE Ended walk() const {
    for (int64_t node = 0;;) {
      const bool coupled = op_.rule == TreeRule::coupled;
      const LawOfRow found = look(node, !coupled, work_.ahead);
      int64_t drawn = found.law.argmax;
      if (drawn < 0)
        drawn = coupled ? flat_race<P>(team_, target_, node, found.law, seed_, position_ + uint64_t(depth_of(node)))
                        : draw_from_row<P>(team_, target_, node, found.law, noise(node));
      int64_t child = next_child(node, node);
      while (child < live_ && token(child) != drawn) child = next_child(node, child);
      if (!found.valid || child == live_) return {node, drawn, found.valid};
      node = child;
    }
  }

  // The draft's probability of a child, whatever its siblings.
  SPECDEC_DEVICE double drafted_prob(int64_t node, const Law& draft, int64_t id) const {
    return !dense() || draft.argmax >= 0 ? 1.0 : exp(log_prob<false>(draft_, node, draft, id));
  }

  // Looks at a node: its laws, and a fresh state. Whether its row and its children's laws are usable.
  SPECDEC_DEVICE bool enter(int64_t node, double reach) const {
    const LawOfRow found = look(node, true, work_.ahead);
    int64_t child = next_child(node, node);
    Node fresh;
    fresh.target = found.law;
    fresh.reach = reach;
    fresh.own_factor = at(node).own_factor;
    fresh.draft.argmax = child < live_ ? token(child) : 0;
    bool usable = found.valid;
    if (usable && child < live_ && found.law.argmax < 0 && dense()) {
      usable = look_at_draft(node, draft_table(node), work_.ahead, fresh.draft);
      for (; child < live_ && usable; child = next_child(node, child))
        usable = drafted_prob(node, fresh.draft, token(child)) < INFINITY;
    }
    fresh.last = usable ? node : live_;  // no child is left to look at where a law is not usable
    team_.sync();
    if (team_.rank() == 0) at(node) = fresh;
    team_.sync();
    return usable;
  }

  // What the children up to `last` left of the draft's law: one minus what they took, summed anew where that would have
  // no digits left.
  SPECDEC_PASS double draft_left(int64_t node, const Node& state) const {
    const double left = 1.0 - state.drafted;
    if (left >= kLeastDifference) return left;
    const Probabilities drafted(state.draft);
    double sum = 0.0;
    for_tiles<1>(team_, 0, tiles_of(all_.vocab), [&](int64_t tile, bool there) {
      if (!there) return;
      float x[kElements];
      load<false>(draft_, node, own_ids(team_, tile), x);
      for (int e = 0; e < kElements; ++e) {
        float weight = drafted(x[e]);
        for (int64_t child = next_child(node, node); child <= state.last && child < live_;
             child = next_child(node, child))
          if (token(child) == own_ids(team_, tile) + e) weight = 0.0f;
        sum += double(weight);
      }
    });
    sum = team_.reduce(sum, Plus());
    return sum < kNothingLeft ? 0.0 : sum;
  }

  // What the rejected children leave of one id of a node.
  SPECDEC_DEVICE float residual(int64_t node, const Node& state, const Probabilities& target,
                                const Probabilities& draft, float target_logit, float draft_logit, int64_t id) const {
    const float prob = target(target_logit);
    const bool certain = !dense() || state.draft.argmax >= 0;
    const float drafted = certain ? 0.0f : draft(draft_logit);
    float left = certain                 ? prob
                 : prob - drafted > 0.0f ? prob - drafted
                                         : 0.0f;  // nothing where the draft is no number
    if (!certain && op_.replacement) return left;
    for (int64_t child = next_child(node, node); child <= state.last && child < live_;
         child = next_child(node, child)) {
      if (token(child) != id) continue;
      // `drafted` is what the last rejection took of it: of this child its own took another part.
      const float share = float(state.factor / at(child).own_factor);
      if (certain)
        left = 0.0f;
      else if (share != 1.0f)
        left = prob - drafted * share > 0.0f ? prob - drafted * share : 0.0f;
    }
    return left;
  }

  // The sum of what is left of this thread's ids of a tile.
  SPECDEC_DEVICE float residuals(int64_t node, const Node& state, const Probabilities& target,
                                 const Probabilities& draft, int64_t first) const {
    const bool certain = !dense() || state.draft.argmax >= 0;
    float x[kElements], y[kElements], sum = 0.0f;
    load<P>(target_, node, first, x);
    if (!certain) load<false>(draft_, node, first, y);
    for (int e = 0; e < kElements; ++e)
      sum += residual(node, state, target, draft, x[e], certain ? 0.0f : y[e], first + e);
    return sum;
  }

  // Of what the rejected children leave, the mass (`race` off), or the winner of the tile race (on).
  struct Left {
    double mass;
    int64_t tile;
  };
  SPECDEC_PASS Left pass_over_residual(int64_t node, const Node& state, bool race) const {
    const Probabilities target(state.target), draft = divided(state.draft, state.factor);
    Arrived first;
    double mass = 0.0;
    for_tiles<1>(team_, 0, tiles_of(all_.vocab), [&](int64_t tile, bool there) {
      const int64_t ids = there ? own_ids(team_, tile) : all_.vocab;
      const float sum = team_.in_group(residuals(node, state, target, draft, ids), Plus());
      if (team_.rank() % kGroup != 0) return;
      mass += double(sum);
      if (race) take_part(first, exponential(noise(node), tile), sum, tile);
    });
    return {team_.reduce(mass, Plus()), race ? team_.reduce(first, Earlier()).id : kNobody};
  }

  // A token of it by the two-level race; kNobody where nothing is left. Without a pass where the node's table is there.
  SPECDEC_PASS int64_t draw_residual(int64_t node, const Node& state) const {
    const Probabilities target(state.target), draft = divided(state.draft, state.factor);
    const bool certain = !dense() || state.draft.argmax >= 0;
    int64_t tile;
    if (work_.ahead) {
      float* const bounds = draft_table(node).maxima;  // no longer asked for
      tile = race_below(state.target, target_table(node), bounds, noise(node),
                        [&](int64_t first) { return residuals(node, state, target, draft, first); });
    } else {
      tile = pass_over_residual(node, state, true).tile;
    }
    if (tile == kNobody) return kNobody;
    return draw_inside(team_, tile, all_.vocab, noise(node), [&](int64_t id) {
      const float draft_logit = certain ? 0.0f : logit<false>(draft_, node, id);
      return residual(node, state, target, draft, logit<P>(target_, node, id), draft_logit, id);
    });
  }

  // Mass and reach of a node after its latest rejection.
  SPECDEC_DEVICE void settle(int64_t node) const {
    const Node state = at(node);
    if (state.settled) return;
    // A point mass is accepted where it is a child, and not touched by other children.
    const double mass = state.target.argmax >= 0 ? state.mass : pass_over_residual(node, state, false).mass;
    const double left = state.reach * mass / state.mass;
    team_.sync();  // all have read what is overwritten now
    if (team_.rank() == 0) {
      Node& here = at(node);
      here.mass = mass;
      here.reach = state.reach < 1.0 ? (left > 0.0 ? left / (left + 1.0 - state.reach) : 0.0) : state.reach;
      here.settled = true;
    }
    team_.sync();
  }

  // Rules recursive and traversal. Recursive goes down to the first child that passes; traversal goes down to any child
  // that may be come to, and up again where a node fails.
  SPECDEC_DEVICE Ended descend() const {
    const bool recursive = op_.rule == TreeRule::recursive;
    int64_t node = 0;
    bool valid = enter(node, 1.0);
    for (;;) {
      const int64_t child = next_child(node, at(node).last);
      const bool bottom_up = !recursive && node > 0;
      if (child < live_ || bottom_up) settle(node);
      const Node state = at(node);
      if (child == live_) {
        if (!bottom_up || coin(seed_, position_, node - 1) < state.reach) break;
        node = parents_[node];
        continue;
      }
      const double below = test(node, child, state);
      if (below > 0.0) {
        node = child;
        valid = enter(node, below) && valid;
      }
    }
    return {node, emit(node, at(node)), valid};
  }

  // Tests a child. Recursive: 1 if it passes, else 0. Traversal: the chance that it is come to; it counts as rejected,
  // to be read only once it is.
  SPECDEC_DEVICE double test(int64_t node, int64_t child, const Node& state) const {
    const bool recursive = op_.rule == TreeRule::recursive, certain = !dense() || state.draft.argmax >= 0;
    const int64_t id = token(child);
    // An earlier sibling of the same token: rejected before, with a factor of its own.
    int64_t twin = next_child(node, node);
    while (twin < child && token(twin) != id) twin = next_child(node, twin);
    const bool fresh = twin == child;
    const double prob = drafted_prob(node, state.draft, id);
    const double left_of_draft = op_.replacement || certain ? 1.0 : draft_left(node, state);
    const double own = op_.replacement || fresh ? state.factor : at(twin).own_factor;
    const double target = exp(log_prob<P>(target_, node, state.target, id));
    const double weight = certain ? (fresh ? target : 0.0) : fmax(target - prob / own, 0.0);
    double conditional = prob;
    if (!op_.replacement && !certain) conditional = fresh && left_of_draft > 0.0 ? prob / left_of_draft : 0.0;
    // Strict: what the target excludes is never accepted, whatever the draft was declared to be.
    double below;
    if (recursive)
      below = coin(seed_, position_, child - 1) * state.mass * conditional < weight ? 1.0 : 0.0;
    else
      below = weight > 0.0 ? fmin(1.0, state.reach * weight / state.mass / conditional) : 0.0;
    team_.sync();  // all have read what is overwritten now
    if (team_.rank() == 0 && (!recursive || below == 0.0)) {
      Node& here = at(node);
      if (left_of_draft > 0.0 && state.reach > 0.0 && state.mass > 0.0) {
        const double taken = state.reach * left_of_draft / state.mass;
        here.factor = state.factor == INFINITY ? taken : 1.0 / (1.0 / state.factor + 1.0 / taken);
      }
      here.drafted += fresh ? prob : 0.0;
      here.last = child;
      here.settled = false;
      at(child).own_factor = fresh ? here.factor : own;
    }
    team_.sync();
    return below;
  }

  // The token that ends the step at a node.
  SPECDEC_DEVICE int64_t emit(int64_t node, const Node& state) const {
    if (state.target.argmax >= 0) return state.target.argmax;
    int64_t drawn = kNobody;
    if (state.last > node && state.last < live_) drawn = draw_residual(node, state);
    return drawn == kNobody ? draw_from_row<P>(team_, target_, node, state.target, noise(node)) : drawn;
  }

  SPECDEC_DEVICE void write(const Ended& end) const {
    const int64_t depth = depth_of(end.node), first = b_ * all_.rows;
    if (team_.rank() == 0) {
      all_.out_accepted[b_] = int32_t(depth);
      all_.out_valid[b_] = end.valid;
      for (int64_t i = depth + 1; i < all_.rows; ++i) write_one(first + i, -1, -1, NAN, NAN);
    }
    int64_t node = end.node, id = end.emitted;
    for (int64_t i = depth; i >= 0; --i) {
      float score = NAN, raw_score = NAN;
      if (all_.out_logprobs) {
        const LawOfRow found = look(node, false, false);  // its table may have been filtered
        if (found.valid) score = float(log_prob<P>(target_, node, found.law, id));
        raw_score = raw_logprob(node, id, target_table(node));
      }
      if (team_.rank() == 0) write_one(first + i, id, int32_t(node), score, raw_score);
      id = token(node), node = node > 0 ? parents_[node] : 0;
    }
  }

  SPECDEC_DEVICE void write_one(int64_t place, int64_t id, int32_t node, float score, float raw_score) const {
    all_.out_tokens[place] = id;
    op_.out_nodes[place] = node;
    if (all_.out_logprobs) all_.out_logprobs[place] = score, all_.out_raw_logprobs[place] = raw_score;
  }

  const VerifyTree& op_;
  const int64_t* const parents_;
  const int64_t live_, node_, part_;
};

}  // namespace specdec::cuda
