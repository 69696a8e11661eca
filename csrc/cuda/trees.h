// `verify_tree`: rules recursive and traversal, and which program each rule has. Semantics:
// specdec_kernels/ops/tree_rules.py.
#pragma once

#include "crew.h"

namespace specdec::cuda {

// What is known of a node that was visited. Rejecting its children one after the other leaves, up to a factor,
// (target - draft / factor)+ with one number, and nothing of the rejected tokens: each was rejected since less was left
// of it than the draft's probability. So it does not matter that siblings drawn without replacement were not drawn from
// those.
struct alignas(16) Node {
  Distribution target, draft;
  bool updated = true;     // mass and path_prob are those after the last rejection
  double path_prob = 1.0;  // the chance that the node is visited at all, rule traversal
  double mass = 1.0;       // of what the rejected children leave
  double drafted = 0.0;    // the draft's probability of them
  double factor = INFINITY;
  int last = 0;  // the last child that was tested
};
static_assert(sizeof(Node) <= kPlaceBytes);

// Rules recursive and traversal, by a crew: each of its blocks keeps what it knows of nodes for itself.
template <class T>
class DescendProgram : CrewProgram<T, VerifyTree> {
  using Base = CrewProgram<T, VerifyTree>;
  using Base::all_, Base::dense, Base::draft, Base::live_, Base::meet, Base::next_child, Base::op_, Base::parent,
      Base::slice_, Base::target, Base::token, Base::uniform_of, Base::work_;

 public:
  SPECDEC_DEVICE DescendProgram(const VerifyTree& op, const Workspace& work, const Part& part)
      : Base(op, work, part),
        nodes_(static_cast<Node*>(work.places) + (int64_t(part.request) * work.slices + part.slice) * op.common.rows),
        recursive_(op.rule == TreeRule::recursive) {}

  SPECDEC_DEVICE void run() {
    const int end = descend();
    if (all_.out_logprobs != nullptr) meet();  // tables are overwritten then
    if (slice_ == 0) {
      // Its table was another node's since, where one table serves all nodes: then there are no others in the crew.
      if (!work_.ahead && !recursive_) measure_anew(target(end));
      Base::write_path(end, draw_at(end, state_of(end)), valid_, nodes_);
    }
    Base::leave();
  }

 private:
  SPECDEC_DEVICE Node state_of(int node) const { return fresh(nodes_ + node); }
  SPECDEC_DEVICE void store_state(int node, const Node& state) const {
    block::sync();  // all have read what is overwritten now
    if (block::rank() == 0) put(nodes_ + node, state);
    block::sync();
  }

  // The distributions of a node, and a fresh state. Whether its row and its children's distributions are usable.
  SPECDEC_DEVICE bool init_node(int node, double path_prob) {
    // Each when it is visited, since all have read the tables of the node before; or all before the root.
    if (!work_.ahead) meet();
    const int measured = !work_.ahead ? node + 1 : node == 0 ? live_ : 0;
    for (int each = node; each < measured; ++each) Base::measure_node(each);
    if (measured > 0) meet();
    int child = next_child(node, node);
    Node fresh;
    fresh.target = distribution_of(target(node));
    fresh.path_prob = path_prob;
    fresh.draft.argmax = child < live_ ? int(token(child)) : 0;
    bool usable = fresh.target.valid;
    if (usable && child < live_ && fresh.target.argmax < 0 && dense()) {
      fresh.draft = Base::draft_distribution(node, fresh.draft);
      usable = fresh.draft.valid;
      for (; child < live_ && usable; child = next_child(node, child))
        usable = Base::drafted_prob(node, fresh.draft, int(token(child))) < INFINITY;
    }
    fresh.last = usable ? node : live_;  // no child is left to test where a distribution is not usable
    store_state(node, fresh);
    return usable;
  }

  SPECDEC_DEVICE bool is_certain(const Node& state) const { return !dense() || state.draft.argmax >= 0; }
  // What the rejected children leave of a node.
  SPECDEC_DEVICE Residual residual_of(const Node& state) const {
    return {probabilities_of(state.target), probabilities_of(state.draft, state.factor), is_certain(state)};
  }

  // f(child) for the children tested so far whose tokens lie in [begin, begin + count).
  template <class F>
  SPECDEC_DEVICE void for_tested(int node, int last, int begin, int count, const F& f) const {
    const int behind = std::min(last + 1, live_);
    const auto next = [&](int after) {
      return block::first_where(after + 1, behind, [&](int child) {
        return Base::is_child(child, node) && token(child) >= begin && token(child) - begin < count;
      });
    };
    SPECDEC_ROLLED
    for (int child = next(node); child < behind; child = next(child)) f(child);
  }
  // Nothing is left of the tested children among ids from `first` on.
  template <int kCount>
  SPECDEC_DEVICE void set_apart(int node, const Node& state, int first, float (&w)[kCount]) const {
    constexpr int kOfWarp = kCount * kLanes;
    for_tested(node, state.last, first / kOfWarp * kOfWarp, kOfWarp,
               [&](int child) { set_at(w, int(token(child)) - first, 0.0f); });
  }

  // The sum of the weights of the ids of a node.
  template <class F>
  SPECDEC_DEVICE float pass(int node, const F& weigh) {
    float* const sums = Base::span_sums(node, passes_++);
    Base::sum_spans(sums, weigh);
    meet();
    return Base::total_of(sums);
  }

  // What the tested children left of the draft's distribution: one minus what they took, summed anew where that would
  // have no digits left.
  SPECDEC_DEVICE double draft_left(int node, const Node& state) {
    const double left = 1.0 - state.drafted;
    if (left >= kLeastDifference) return left;
    const Probabilities drafted = probabilities_of(state.draft);
    const double sum = pass(node, [&](int first, float (&w)[kElements]) {
      draft(node).load(first, w);
      SPECDEC_UNROLL
      for (float& weight : w) weight = drafted(weight);
      set_apart(node, state, first, w);
    });
    return sum < kNothingLeft ? 0.0 : sum;
  }

  // Mass and path probability of a node after its latest rejection.
  SPECDEC_DEVICE void update_residual(int node) {
    Node state = state_of(node);
    if (state.updated) return;
    double mass = state.mass;
    if (state.target.argmax < 0) {  // a point mass is accepted where it is a child, and not touched by other children
      const Residual residual = residual_of(state);
      mass = pass(node, [&](int first, float (&w)[kElements]) {
        Base::weigh(node, residual, first, w);
        set_apart(node, state, first, w);
      });
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
    double below = 1.0;
    for (;;) {
      if (below > 0.0) valid_ = init_node(node, below) && valid_;
      const int child = next_child(node, state_of(node).last);
      const bool bottom_up = !recursive_ && node > 0;
      if (child < live_ || bottom_up) update_residual(node);
      const Node state = state_of(node);
      if (child == live_) {
        if (!bottom_up || uniform_of(node) < state.path_prob) return node;
        node = parent(node), below = 0.0;
        continue;
      }
      below = test(node, child, state);
      if (below > 0.0) node = child;
    }
  }

  // Tests a child. Recursive: 1 if it passes, else 0. Traversal: the chance that it is visited; it counts as rejected,
  // to be read only once it is.
  SPECDEC_DEVICE double test(int node, int child, const Node& state) {
    const bool certain = is_certain(state);
    const int64_t id = token(child);
    const bool fresh = child == block::first_where(node + 1, child, [&](int earlier) {
                         return Base::is_child(earlier, node) && token(earlier) == id;
                       });
    const double prob = Base::drafted_prob(node, state.draft, int(id));
    const double left_of_draft = op_.replacement || certain ? 1.0 : draft_left(node, state);
    const double conditional = left_of_draft > 0.0 ? prob / left_of_draft : 0.0;
    const double target_prob = prob_of(state.target, target(node).logit(int(id)), int(id));
    const double left = certain ? target_prob : fmax(target_prob - prob / state.factor, 0.0);
    const double weight = fresh ? left : 0.0;
    // Strict: what the target excludes is never accepted, whatever the draft was declared to be.
    double below;
    if (recursive_)
      below = uniform_of(child) * state.mass * conditional < weight ? 1.0 : 0.0;
    else
      below = weight > 0.0 ? fmin(1.0, state.path_prob * weight / state.mass / conditional) : 0.0;
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
    return below;
  }

  // The token that ends the step at a node.
  SPECDEC_DEVICE int draw_at(int node, const Node& state) const {
    if (state.target.argmax >= 0) return state.target.argmax;
    const Residual residual = residual_of(state);
    const bool rejected = state.last > node && state.last < live_;
    return Base::draw_after(node, state.target, residual, rejected,
                            [&](int first, auto& w) { set_apart(node, state, first, w); });
  }

  Node* const nodes_;
  const bool recursive_;
  bool valid_ = true;
  int passes_ = 0;
};

template <class F>
auto with_program(const VerifyTree& op, const F& f) {
  return with_dtype(op, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (op.rule) {
      case TreeRule::walk: return f(TypeOf<VerifyProgram<T, VerifyTree, By::draw>>());
      case TreeRule::coupled: return f(TypeOf<VerifyProgram<T, VerifyTree, By::race>>());
      default: return f(TypeOf<DescendProgram<T>>());
    }
  });
}

}  // namespace specdec::cuda
