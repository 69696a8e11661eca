// `verify_tree`. Semantics: specdec_kernels/ops/tree_rules.py.
#pragma once

#include "residual.h"

namespace specdec::cuda {

// What the rules of trees have in common.
template <class T>
class TreeProgram : protected ResidualProgram<T> {
  using Base = ResidualProgram<T>;

 protected:
  using Base::all_, Base::b_, Base::parents_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::dense, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::is_token, Base::noise, Base::position, Base::raw_logprob,
      Base::request, Base::sampling, Base::seed, Base::target, Base::token;

  SPECDEC_DEVICE TreeProgram(const Team& team, const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(team, op.common, work, part.request, nullptr, op.parents + int64_t(part.request) * op.common.rows),
        op_(op),
        live_(live_nodes(team, parents_, rows_)) {}

  SPECDEC_DEVICE int parent(int node) const { return int(given(parents_ + node)); }

  SPECDEC_DEVICE int depth_of(int node) const {
    int depth = 0;
    SPECDEC_ROLLED
    for (; node > 0; node = parent(node)) ++depth;
    return depth;
  }

  // A node whose token is none is no child.
  SPECDEC_DEVICE bool is_child(int child, int node) const {
    return child > node && child < live_ && parent(child) == node && is_token(any_token(child));
  }

  template <class State>
  SPECDEC_DEVICE void write(int i, int node, int id, const State* state) const {
    const int64_t at = request() * rows_ + i;
    if (team_.rank() == 0) all_.out_tokens[at] = id, op_.out_nodes[at] = node;
    this->write_logprobs(i, node, id, state);
  }
  template <class State>
  SPECDEC_DEVICE void write_end(int depth, bool valid, const State* none) const {
    if (team_.rank() == 0) all_.out_accepted[b_] = depth, all_.out_valid[b_] = valid;
    SPECDEC_ROLLED
    for (int i = depth + 1; i < rows_; ++i) write(i, -1, -1, none);
  }

  const VerifyTree& op_;
  const int live_;
};

// What is drawn at a node, and the child that has it; -1 where the path ends.
struct alignas(16) Visited {
  Distribution target;
  int drawn, next;
  bool valid;
};

// Rules walk and coupled, by rows like a chain: nodes come after their parents.
template <class T, bool kIsCoupled>
class WalkProgram : TreeProgram<T> {
  using Base = TreeProgram<T>;
  using Base::all_, Base::b_, Base::live_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::coupled_noise, Base::depth_of, Base::is_child, Base::noise, Base::parent,
      Base::request, Base::sampling, Base::target, Base::token, Base::write, Base::write_end;

 public:
  SPECDEC_DEVICE WalkProgram(const Team& team, const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(team, op, work, part), node_(part.row), slice_(part.slice) {}

  SPECDEC_DEVICE void run() {
    const int there = live_ > 0 ? live_ : 1;  // the first row is asked for even where there is no tree
    if (node_ >= there) return;
    const Table table = this->table(node_);
    this->run_row(
        node_, [&] { return there; },
        [&] {
          const Noise noise = kIsCoupled ? coupled_noise(depth_of(node_)) : Noise{};
          measure_slice<kIsCoupled>(team_, target(), node_, sampling().measure(vocab_), noise, work_, slice_, table,
                                    [] {});
        },
        [&] {
          const int next = visit(table);
          return [this, next](int node) { return passed_by(node, next); };
        },
        [&] { write_path(); });
  }

 private:
  SPECDEC_DEVICE Table table(int node) const { return work_.table(2 * (request() * rows_ + node)); }
  SPECDEC_DEVICE Visited* place(int node) const {
    return static_cast<Visited*>(work_.places) + request() * rows_ + node;
  }

  SPECDEC_DEVICE int visit(const Table& table) const {
    Visited here;
    here.valid = distribution_of(team_, target(), node_, sampling(), table, here.target);
    here.drawn = here.target.argmax;
    if (here.drawn < 0)
      here.drawn = kIsCoupled ? flat_race(team_, target(), node_, here.target, table, coupled_noise(depth_of(node_)))
                              : draw_from_row(team_, target(), node_, here.target, table, noise(node_));
    int next = kNobody;
    SPECDEC_ROLLED
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
      write(depth, node, here.drawn, place(node));
      if (here.next < 0) break;
      node = here.next;
    }
    write_end(depth, here.valid, place(0));
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
  float share = 0.0f;            // its parent's factor by that
  int last = 0;                  // the last child that was tested
};

// Rules recursive and traversal, by a crew: each of its blocks keeps what it knows of nodes for itself.
template <class T>
class DescendProgram : TreeProgram<T> {
  using Base = TreeProgram<T>;
  using Base::all_, Base::b_, Base::live_, Base::op_, Base::rows_, Base::team_, Base::vocab_, Base::work_;
  using Base::any_token, Base::counters, Base::dense, Base::depth_of, Base::draft, Base::draft_distribution,
      Base::draft_logit, Base::draft_measure, Base::draw_after, Base::is_child, Base::noise, Base::parent,
      Base::position, Base::request, Base::sampling, Base::seed, Base::target, Base::token, Base::write,
      Base::write_end;

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
  SPECDEC_DEVICE int64_t place(int node) const { return 2 * (work_.ahead ? request() * rows_ + node : request()); }
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
    SPECDEC_ROLLED
    for (int first = after + 1; first < live_; first += 32) {
      const uint32_t hits = team_.bits([&](int bit) { return is_child(first + bit, node); });
      if (hits != 0) return first + first_bit(hits);
    }
    return live_;
  }

  SPECDEC_DEVICE void measure_node(int node) const {
    const int first = crew_.first_span(), stride = crew_.stride();
    measure_row<T>(team_, target(), node, first, work_.spans, stride, sampling().measure(vocab_), target_table(node));
    if (!dense() || all_.draft_stats != nullptr || sampling().greedy() || next_child(node, node) == live_) return;
    measure_row<T>(team_, draft(), node, first, work_.spans, stride, draft_measure(), draft_table(node));
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

  SPECDEC_DEVICE bool is_certain(const Node& state) const { return !dense() || state.draft.argmax >= 0; }
  // What the rejected children leave of a node.
  SPECDEC_DEVICE Residual residual_of(const Node& state) const {
    return {Probabilities(state.target), Probabilities(state.draft, state.factor), is_certain(state)};
  }
  // Of a rejected child: nothing of a point mass; else `draft` is what the last rejection took of it, and of this child
  // its own took another part.
  SPECDEC_DEVICE float residual_of_child(int node, const Residual& residual, int child) const {
    if (residual.certain) return 0.0f;
    const int id = token(child);
    return residual(target().logit(node, id), draft_logit(node, id), fresh(&nodes_[child].share));
  }
  // Writes down those parts, once for all ids.
  SPECDEC_DEVICE void set_shares(int node, const Node& state) const {
    for_tested(node, state.last, 0, vocab_, [&](int child) {
      if (team_.rank() == 0) put(&nodes_[child].share, float(state.factor / fresh(&nodes_[child].own_factor)));
    });
    team_.sync();
  }
  // Whether rejected children have a part of their own in what is left.
  SPECDEC_DEVICE bool sets_apart(const Node& state) const { return !op_.replacement || is_certain(state); }

  // f(child) for the children tested so far whose tokens lie in [begin, begin + count).
  template <class F>
  SPECDEC_DEVICE void for_tested(int node, int last, int begin, int count, const F& f) const {
    SPECDEC_ROLLED
    for (int first = node + 1; first <= last && first < live_; first += 32) {
      uint32_t hits = team_.bits([&](int bit) {
        const int child = first + bit;
        return child <= last && is_child(child, node) && token(child) >= begin && token(child) - begin < count;
      });
      SPECDEC_ROLLED
      for (; hits != 0; hits &= hits - 1) f(first + first_bit(hits));
    }
  }

  // The sum of f over the ids of a node, and for tokens of tested children, where those are set apart, `apart(child)`.
  template <bool kTarget, class F, class G>
  SPECDEC_DEVICE float pass(int node, const Node& state, bool with_draft, bool set_apart, const F& f, const G& apart) {
    const Table table = target_table(node);
    Base::template sum_spans<kTarget>(crew_, node, with_draft, span_sums(table, passes_), f,
                                      [&](int span, LaneBits& bits) {
                                        float mass = 0.0f;
                                        if (set_apart)
                                          for_tested(node, state.last, span * kSpan, kSpan, [&](int child) {
                                            const int bit = LaneBits::bit_of(team_, span, token(child));
                                            if (bit >= 0 && !bits.add(bit))
                                              mass += apart(child);  // once where the same token is there again
                                          });
                                        return mass;
                                      });
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
        pass<false>(node, state, true, true, [&](float, float y) { return drafted(y); }, [](int) { return 0.0f; });
    return sum < kNothingLeft ? 0.0 : sum;
  }

  // Mass and path probability of a node after its latest rejection.
  SPECDEC_DEVICE void update_residual(int node) {
    Node state = state_of(node);
    if (state.updated) return;
    double mass = state.mass;
    if (state.target.argmax < 0) {  // a point mass is accepted where it is a child, and not touched by other children
      const Residual residual = residual_of(state);
      set_shares(node, state);
      mass = pass<true>(
          node, state, !residual.certain, sets_apart(state), [&](float x, float y) { return residual(x, y); },
          [&](int child) { return residual_of_child(node, residual, child); });
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
    double below = 1.0, own_factor = INFINITY;
    for (;;) {
      if (below > 0.0) valid_ = init_node(node, below, own_factor) && valid_;
      const int child = next_child(node, state_of(node).last);
      const bool bottom_up = !recursive_ && node > 0;
      if (child < live_ || bottom_up) update_residual(node);
      const Node state = state_of(node);
      if (child == live_) {
        if (!bottom_up || uniform(seed(), position(), node - 1) < state.path_prob) return node;
        node = parent(node), below = 0.0;
        continue;
      }
      below = test(node, child, state, own_factor);
      if (below > 0.0) node = child;
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

  // The token that ends the step at a node.
  SPECDEC_DEVICE int draw_at(int node, const Node& state) const {
    if (state.target.argmax >= 0) return state.target.argmax;
    const Residual residual = residual_of(state);
    const bool rejected = state.last > node && state.last < live_;
    if (rejected) set_shares(node, state);
    return draw_after(node, state.target.filtered(), target_table(node), residual, rejected, [&](int first, float* w) {
      if (!sets_apart(state)) return;
      for_tested(node, state.last, first / kTileIds * kTileIds, kTileIds, [&](int child) {
        const int at = token(child) - first;
        if (at < 0 || at >= 4) return;
        const float left = residual_of_child(node, residual, child);
        SPECDEC_UNROLL
        for (int k = 0; k < 4; ++k)
          if (k == at) w[k] = left;
      });
    });
  }

  SPECDEC_DEVICE void write_path(int end) const {
    const int depth = depth_of(end);
    int node = end, id = draw_at(end, state_of(end));
    for (int i = depth; i >= 0; --i) {
      write(i, node, id, nodes_ + node);
      id = token(node), node = node > 0 ? parent(node) : 0;
    }
    write_end(depth, valid_, nodes_);
  }

  Crew crew_;
  Node* const nodes_;
  const bool recursive_;
  bool valid_ = true;
  int passes_ = 0;
};

static_assert(sizeof(Visited) <= kPlaceBytes && sizeof(Node) <= kPlaceBytes);

template <class F>
auto with_program(const VerifyTree& op, const F& f) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (op.rule) {
      case TreeRule::walk: return f(TypeOf<WalkProgram<T, false>>());
      case TreeRule::coupled: return f(TypeOf<WalkProgram<T, true>>());
      default: return f(TypeOf<DescendProgram<T>>());
    }
  });
}

}  // namespace specdec::cuda
