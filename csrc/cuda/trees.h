// `verify_tree`. Semantics: specdec_kernels/ops/tree_rules.py.
#pragma once

#include "crew.h"

namespace specdec::cuda {

// What the rules of trees have in common.
template <class T>
class TreeProgram : protected RequestProgram<T> {
  using Base = RequestProgram<T>;

 protected:
  using Base::all_, Base::b_, Base::parents_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::dense, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::is_settled, Base::is_token, Base::leave, Base::noise,
      Base::position, Base::raw_logprob, Base::sampling, Base::seed, Base::settle, Base::target, Base::token;

  SPECDEC_DEVICE TreeProgram(const Team& team, const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(team, op.common, work, part.request, nullptr), op_(op) {
    parents_ = op.parents + int64_t(part.request) * op.common.rows;
    live_ = live_nodes();
  }

  SPECDEC_DEVICE int parent(int node) const { return int(given(parents_ + node)); }

  // Nodes before the first one without a parent among the earlier.
  SPECDEC_DEVICE int live_nodes() const {
    for (int first = 0; first < rows_; first += 32) {
      const uint32_t ends = team_.bits([&](int bit) {
        const int node = first + bit;
        if (node >= rows_) return true;
        const int64_t up = given(parents_ + node);
        return node == 0 ? up != -1 : up < 0 || up >= node;
      });
      if (ends != 0) return first + first_bit(ends);
    }
    return rows_;
  }

  SPECDEC_DEVICE int depth_of(int node) const {
    int depth = 0;
    for (; node > 0; node = parent(node)) ++depth;
    return depth;
  }

  // A node whose token is none is no child.
  SPECDEC_DEVICE bool is_child(int child, int node) const {
    return child > node && child < live_ && parent(child) == node && is_token(any_token(child));
  }

  // What the path has in row i of the results: the token that follows node `node`, and whether its row is valid.
  SPECDEC_DEVICE void write(int i, int node, int id, float score) const {
    const int64_t at = int64_t(b_) * rows_ + i;
    const float raw = all_.out_logprobs && node >= 0 ? raw_logprob(node, id) : NAN;
    if (team_.rank() != 0) return;
    all_.out_tokens[at] = id, op_.out_nodes[at] = node;
    if (all_.out_logprobs) all_.out_logprobs[at] = score, all_.out_raw_logprobs[at] = raw;
  }
  SPECDEC_DEVICE void write_end(int depth, bool valid) const {
    if (team_.rank() == 0) all_.out_accepted[b_] = depth, all_.out_valid[b_] = valid;
    for (int i = depth + 1; i < rows_; ++i) write(i, -1, -1, NAN);
  }

  const VerifyTree& op_;
  int live_;
};

// What is drawn at a node, and the child that has it; -1 where the path ends.
struct alignas(16) Visited {
  Distribution target;
  int drawn, next;
  bool valid;
};

// Rules walk and coupled, by rows like a chain: nodes come after their parents, so where blocks start in that order,
// those of nodes that the path is known to pass by find that out and read nothing.
template <class T, bool kIsCoupled>
class WalkProgram : TreeProgram<T> {
  using Base = TreeProgram<T>;
  using Base::all_, Base::b_, Base::live_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::depth_of, Base::is_child, Base::is_settled,
      Base::leave, Base::noise, Base::parent, Base::sampling, Base::settle, Base::target, Base::token, Base::write,
      Base::write_end;

 public:
  SPECDEC_DEVICE WalkProgram(const Team& team, const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(team, op, work, part), node_(part.row), slice_(part.slice) {}

  SPECDEC_DEVICE void run() {
    const int there = live_ > 0 ? live_ : 1;  // the first row is asked for even where there is no tree
    if (node_ >= there) return;
    const Table table = this->table(node_);
    const bool needed = !work_.in_waves || !team_.any(is_settled(node_));
    if (needed)
      measure_slice<kIsCoupled>(team_, target(), node_, sampling().measure(vocab_),
                                kIsCoupled ? coupled_noise(depth_of(node_)) : Noise{}, work_, slice_, table, [] {});
    const int code = when_all_came(team_, counters() + node_, work_.slices, [&] { return is_settled(node_) ? 2 : 1; });
    if (code == 0) return;
    bool decides = false;
    if (code == 1) {
      const int next = visit(table);
      decides = settle(there, [&](int node) { return node == node_ || passed_by(node, next); });
    }
    leave(there);
    if (decides) write_path();
  }

 private:
  SPECDEC_DEVICE Table table(int node) const { return work_.table(2 * (int64_t(b_) * rows_ + node)); }
  SPECDEC_DEVICE Visited* place(int node) const {
    return static_cast<Visited*>(work_.places) + int64_t(b_) * rows_ + node;
  }

  SPECDEC_DEVICE int visit(const Table& table) const {
    Visited here;
    here.valid = distribution_of(team_, target(), node_, sampling(), table, here.target);
    here.drawn = here.target.argmax;
    if (here.drawn < 0)
      here.drawn = kIsCoupled ? flat_race(team_, target(), node_, here.target, table, coupled_noise(depth_of(node_)))
                              : draw_from_row(team_, target(), node_, here.target, table, noise(node_));
    int next = kNobody;
    for (int child = node_ + 1 + team_.rank(); here.valid && child < live_ && next == kNobody; child += kThreads)
      if (is_child(child, node_) && token(child) == here.drawn) next = child;
    next = team_.reduce(next, Smaller());
    here.next = next == kNobody ? -1 : next;
    if (team_.rank() == 0) put(place(node_), here);
    return here.next;
  }

  // Whether a node is below this one, and not below its child `next`, nor that child.
  SPECDEC_DEVICE bool passed_by(int node, int next) const {
    int below = node;
    while (node > node_) below = node, node = parent(node);
    return node == node_ && below != node_ && below != next;
  }

  SPECDEC_DEVICE void write_path() const {
    Visited here;
    int depth = 0;
    for (int node = 0;; ++depth) {
      here = fresh(place(node));
      const bool scored = all_.out_logprobs && here.valid;
      write(depth, node, here.drawn,
            scored ? float(here.target.log_prob(target().logit(node, here.drawn), here.drawn)) : NAN);
      if (here.next < 0) break;
      node = here.next;
    }
    write_end(depth, here.valid);
  }

  const int node_, slice_;
};

// What is known of a node that was visited. Rejecting its children one after the other leaves, up to a factor,
// (target - draft / factor)+ with one number; but siblings drawn without replacement were not drawn from what was
// rejected before them, so a rejected token has a factor of its own.
struct alignas(16) Node {
  Distribution target, draft;
  bool valid = false;
  bool updated = true;     // mass and path_prob are those after the last rejection
  double path_prob = 1.0;  // the chance that the node is visited at all, rule traversal
  double mass = 1.0;       // of what the rejected children leave
  double drafted = 0.0;    // the draft's probability of them
  double factor = INFINITY;
  double own_factor = INFINITY;  // as a rejected child
  int last = 0;                  // the last child that was tested
};

// Rules recursive and traversal, by a crew: each of its blocks keeps what it knows of nodes for itself.
template <class T>
class DescendProgram : TreeProgram<T> {
  using Base = TreeProgram<T>;
  using Base::all_, Base::b_, Base::live_, Base::op_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::dense, Base::depth_of, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::is_child, Base::noise, Base::parent, Base::position, Base::sampling,
      Base::seed, Base::target, Base::token, Base::write, Base::write_end;

 public:
  SPECDEC_DEVICE DescendProgram(const Team& team, const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(team, op, work, part),
        crew_(team, counters(), part.slice, work.slices),
        nodes_(static_cast<Node*>(work.places) + (int64_t(b_) * work.slices + part.slice) * rows_),
        recursive_(op.rule == TreeRule::recursive) {}

  SPECDEC_DEVICE void run() {
    if (work_.ahead) {
      for (int node = 0; node < live_ || node == 0; ++node) measure_node(node);
      crew_.meet();
    }
    const int end = descend();
    if (crew_.block() == 0) {
      // Its table was another node's since, where one table serves all nodes: then there are no others in the crew.
      if (!work_.ahead && !recursive_) measure_node(end), team_.sync();
      write_path(end);
    }
    crew_.leave();
  }

 private:
  SPECDEC_DEVICE int64_t place(int node) const { return 2 * (work_.ahead ? int64_t(b_) * rows_ + node : b_); }
  SPECDEC_DEVICE Table target_table(int node) const { return work_.table(place(node)); }
  SPECDEC_DEVICE Table draft_table(int node) const { return work_.table(place(node) + 1); }
  SPECDEC_DEVICE Node state_of(int node) const { return fresh(nodes_ + node); }
  SPECDEC_DEVICE void store_state(int node, const Node& state) const {
    team_.sync();  // all have read what is overwritten now
    if (team_.rank() == 0) put(nodes_ + node, state);
    team_.sync();
  }

  // The first child of a node behind `after`; the number of nodes if there is none.
  SPECDEC_DEVICE int next_child(int node, int after) const {
    for (int first = after + 1; first < live_; first += 32) {
      const uint32_t hits = team_.bits([&](int bit) { return is_child(first + bit, node); });
      if (hits != 0) return first + first_bit(hits);
    }
    return live_;
  }

  SPECDEC_DEVICE void measure_node(int node) {
    measure<false>(team_, target(), node, crew_.first_span(), work_.spans, crew_.stride(), sampling().measure(vocab_),
                   {}, target_table(node), [] {});
    if (!dense() || all_.draft_stats != nullptr || sampling().greedy() || next_child(node, node) == live_) return;
    measure<false>(team_, draft(), node, crew_.first_span(), work_.spans, crew_.stride(), draft_measure(), {},
                   draft_table(node), [] {});
  }

  // The draft's probability of a child, whatever its siblings.
  SPECDEC_DEVICE double drafted_prob(int node, const Distribution& draft, int id) const {
    return !dense() || draft.argmax >= 0 ? 1.0 : prob_of(draft, draft_logit(node, id), id);
  }

  // The distributions of a node, and a fresh state. Whether its row and its children's distributions are usable.
  SPECDEC_DEVICE bool init_node(int node, double path_prob, double own_factor) {
    if (!work_.ahead) {
      crew_.meet();  // all have read the tables of the node before
      measure_node(node);
      crew_.meet();
    }
    int child = next_child(node, node);
    Node fresh;
    fresh.valid = distribution_of(team_, target(), node, sampling(), target_table(node), fresh.target);
    fresh.path_prob = path_prob, fresh.own_factor = own_factor;
    fresh.draft.argmax = child < live_ ? token(child) : 0;
    bool usable = fresh.valid;
    if (usable && child < live_ && fresh.target.argmax < 0 && dense()) {
      usable = draft_distribution(node, draft_table(node), fresh.draft);
      for (; child < live_ && usable; child = next_child(node, child))
        usable = drafted_prob(node, fresh.draft, token(child)) < INFINITY;
    }
    fresh.last = usable ? node : live_;  // no child is left to test where a distribution is not usable
    store_state(node, fresh);
    return usable;
  }

  // What the rejected children leave of one id of a node.
  struct Residual {
    Probabilities target, draft;
    bool certain;

    SPECDEC_DEVICE float operator()(float target_logit, float draft_logit, float share) const {
      const float prob = target(target_logit);
      if (certain) return prob;
      const float left = prob - draft(draft_logit) * share;
      return left > 0.0f ? left : 0.0f;  // nothing where the draft is no number
    }
  };
  SPECDEC_DEVICE bool is_certain(const Node& state) const { return !dense() || state.draft.argmax >= 0; }
  SPECDEC_DEVICE Residual residual_of(const Node& state) const {
    return {Probabilities(state.target), Probabilities(state.draft, state.factor), is_certain(state)};
  }
  // Of a rejected child: nothing of a point mass; else `draft` is what the last rejection took of it, and of this child
  // its own took another part.
  SPECDEC_DEVICE float residual_of_child(int node, const Node& state, const Residual& residual, int child) const {
    if (residual.certain) return 0.0f;
    const int id = token(child);
    return residual(target().logit(node, id), draft_logit(node, id), float(state.factor / state_of(child).own_factor));
  }
  // Whether rejected children have a part of their own in what is left.
  SPECDEC_DEVICE bool sets_apart(const Node& state) const { return !op_.replacement || is_certain(state); }

  // f(child) for the children tested so far whose tokens lie in [begin, begin + count).
  template <class F>
  SPECDEC_DEVICE void for_tested(int node, int last, int begin, int count, const F& f) const {
    for (int first = node + 1; first <= last && first < live_; first += 32) {
      uint32_t hits = team_.bits([&](int bit) {
        const int child = first + bit;
        return child <= last && is_child(child, node) && token(child) >= begin && token(child) - begin < count;
      });
      for (; hits != 0; hits &= hits - 1) f(first + first_bit(hits));
    }
  }

  // The sum of f over the ids of this warp's spans, each lane's part of a span at a time: f(x, y), and for tokens of
  // tested children, where those are set apart, `apart(child)`. Left where total_of finds it.
  template <class F, class G>
  SPECDEC_DEVICE float pass(int node, const Node& state, bool with_target, bool with_draft, bool set_apart, const F& f,
                            const G& apart) {
    const Table table = target_table(node);
    for (int span = crew_.first_span(); span < work_.spans; span += crew_.stride()) {
      Span<T> x, y;
      if (with_target) x.load(team_, target(), node, span);
      if (with_draft) y.load(team_, draft(), node, span);
      uint32_t skip[kLoads] = {};
      float mass = 0.0f;
      if (set_apart)
        for_tested(node, state.last, span * kSpan, kSpan, [&](int child) {
          const int offset = token(child) - span * kSpan, load = offset / (kElements * kLanes);
          if (offset / kElements % kLanes != team_.lane()) return;
          bool twin = false;  // the same token again
          SPECDEC_UNROLL
          for (int u = 0; u < kLoads; ++u) {
            if (u != load) continue;
            twin = (skip[u] >> offset % kElements & 1) != 0;
            skip[u] |= 1u << offset % kElements;
          }
          if (!twin) mass += apart(child);
        });
      SPECDEC_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) {
          const float left = f(with_target ? x.v[u].at(e) : 0.0f, with_draft ? y.v[u].at(e) : 0.0f);
          mass += (skip[u] >> e & 1) != 0 ? 0.0f : left;
        }
      }
      mass = team_.in_warp(mass, Plus());
      if (team_.lane() == 0) put(span_sums(table, passes_) + span, mass);
    }
    crew_.meet();
    return total_of(team_, table, passes_++);
  }

  // What the tested children left of the draft's distribution: one minus what they took, summed anew where that would
  // have no digits left.
  SPECDEC_DEVICE double draft_left(int node, const Node& state) {
    const double left = 1.0 - state.drafted;
    if (left >= kLeastDifference) return left;
    const Probabilities drafted(state.draft);
    const double sum =
        pass(node, state, false, true, true, [&](float, float y) { return drafted(y); }, [](int) { return 0.0f; });
    return sum < kNothingLeft ? 0.0 : sum;
  }

  // Mass and path probability of a node after its latest rejection.
  SPECDEC_DEVICE void update_residual(int node) {
    Node state = state_of(node);
    if (state.updated) return;
    double mass = state.mass;
    if (state.target.argmax < 0) {  // a point mass is accepted where it is a child, and not touched by other children
      const Residual residual = residual_of(state);
      mass = pass(
          node, state, true, !residual.certain, sets_apart(state),
          [&](float x, float y) { return residual(x, y, 1.0f); },
          [&](int child) { return residual_of_child(node, state, residual, child); });
    }
    const double left = state.path_prob * mass / state.mass;
    state.mass = mass;
    if (state.path_prob < 1.0) state.path_prob = left > 0.0 ? left / (left + 1.0 - state.path_prob) : 0.0;
    state.updated = true;
    store_state(node, state);
  }

  // Recursive goes down to the first child that passes; traversal goes down to any child that may be visited, and up
  // again where a node fails. The node where the path ends.
  SPECDEC_DEVICE int descend() {
    int node = 0;
    valid_ = init_node(node, 1.0, INFINITY);
    for (;;) {
      const int child = next_child(node, state_of(node).last);
      const bool bottom_up = !recursive_ && node > 0;
      if (child < live_ || bottom_up) update_residual(node);
      const Node state = state_of(node);
      if (child == live_) {
        if (!bottom_up || uniform(seed(), position(), node - 1) < state.path_prob) return node;
        node = parent(node);
        continue;
      }
      double own_factor;
      const double below = test(node, child, state, own_factor);
      if (below > 0.0) {
        node = child;
        valid_ = init_node(node, below, own_factor) && valid_;
      }
    }
  }

  // Tests a child. Recursive: 1 if it passes, else 0. Traversal: the chance that it is visited; it counts as rejected,
  // to be read only once it is.
  SPECDEC_DEVICE double test(int node, int child, const Node& state, double& own_factor) {
    const bool certain = is_certain(state);
    const int id = token(child);
    // An earlier sibling of the same token: rejected before, with a factor of its own.
    int twin = next_child(node, node);
    while (twin < child && token(twin) != id) twin = next_child(node, twin);
    const bool fresh = twin == child;
    const double prob = drafted_prob(node, state.draft, id);
    const double left_of_draft = op_.replacement || certain ? 1.0 : draft_left(node, state);
    const double own = op_.replacement || fresh ? state.factor : state_of(twin).own_factor;
    const double target_prob = prob_of(state.target, target().logit(node, id), id);
    const double weight = certain ? (fresh ? target_prob : 0.0) : fmax(target_prob - prob / own, 0.0);
    double conditional = prob;
    if (!op_.replacement && !certain) conditional = fresh && left_of_draft > 0.0 ? prob / left_of_draft : 0.0;
    // Strict: what the target excludes is never accepted, whatever the draft was declared to be.
    double below;
    if (recursive_)
      below = uniform(seed(), position(), child - 1) * state.mass * conditional < weight ? 1.0 : 0.0;
    else
      below = weight > 0.0 ? fmin(1.0, state.path_prob * weight / state.mass / conditional) : 0.0;
    own_factor = INFINITY;
    if (recursive_ && below > 0.0) return below;
    Node here = state;
    if (left_of_draft > 0.0 && state.path_prob > 0.0 && state.mass > 0.0) {
      const double taken = state.path_prob * left_of_draft / state.mass;
      here.factor = state.factor == INFINITY ? taken : 1.0 / (1.0 / state.factor + 1.0 / taken);
    }
    here.drafted += fresh ? prob : 0.0;
    here.last = child;
    here.updated = false;
    store_state(node, here);
    own_factor = fresh ? here.factor : own;
    Node tested;
    tested.own_factor = own_factor;
    store_state(child, tested);
    return below;
  }

  // The token that ends the step at a node: of what its rejected children left, or of the target's own probabilities
  // where that is nothing, or none was rejected.
  SPECDEC_DEVICE int draw_after(int node, const Node& state) const {
    if (state.target.argmax >= 0) return state.target.argmax;
    const Residual residual = residual_of(state);
    bool rejected = state.last > node && state.last < live_;
    for (;;) {
      const int drawn = draw(team_, state.target, target_table(node), noise(node), [&](int first, float* w) {
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int id = first + k;
          if (id >= vocab_)
            w[k] = 0.0f;
          else if (!rejected)
            w[k] = residual.target(target().logit(node, id));
          else
            w[k] = residual(target().logit(node, id), residual.certain ? 0.0f : draft_logit(node, id), 1.0f);
        }
        if (!rejected || !sets_apart(state)) return;
        const int tile = first / kTileIds * kTileIds;
        for_tested(node, state.last, tile, kTileIds, [&](int child) {
          const int at = token(child) - first;
          if (at < 0 || at >= 4) return;
          const float left = residual_of_child(node, state, residual, child);
          SPECDEC_UNROLL
          for (int k = 0; k < 4; ++k)
            if (k == at) w[k] = left;
        });
      });
      if (drawn != kNobody || !rejected) return drawn;
      rejected = false;
    }
  }

  SPECDEC_DEVICE void write_path(int end) const {
    const int depth = depth_of(end);
    int node = end, id = draw_after(end, state_of(end));
    for (int i = depth; i >= 0; --i) {
      float score = NAN;
      if (all_.out_logprobs) {
        const Node state = state_of(node);
        if (state.valid) score = float(state.target.log_prob(target().logit(node, id), id));
      }
      write(i, node, id, score);
      id = token(node), node = node > 0 ? parent(node) : 0;
    }
    write_end(depth, valid_);
  }

  Crew crew_;
  Node* const nodes_;
  const bool recursive_;
  bool valid_ = false;
  int passes_ = 0;
};

}  // namespace specdec::cuda
