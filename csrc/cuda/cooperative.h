// The rules that go over rows again and again: block on chains, recursive and traversal on trees (semantics:
// specdec_kernels/ops/tree_rules.py). The blocks that share a request run the same program on the same numbers. What
// differs is which spans of a row a block goes over; after each pass they meet, and each adds up what all of them
// found, in the same order. They are launched together, so that none waits for a block that has not started.
#pragma once

#include "verify.h"

namespace specdec::cuda {

// What a block knows of a node that was visited; each keeps it for itself.
struct alignas(16) State {
  double path_prob;      // the chance that the node is visited at all; on the way down of rule recursive 1
  double mass = 1.0;     // of what the rejected children leave
  double drafted = 0.0;  // the draft's probability of them
  double factor = INFINITY;
  int last;             // the last child that was tested, the node itself if none, `live` if none may be
  bool updated = true;  // mass and path_prob are those after the last rejection
};
static_assert(sizeof(State) <= kStateBytes);

// What its threads have alike, which is read again and not kept in registers.
struct Visited : Request {
  State state;
  double below;  // the chance that the child that was tested is visited; 0 where the path does not go on to it
  int child;     // that is tested
  uint32_t meetings;
};
static_assert(sizeof(Visited) <= sizeof(BlockMemory::request));

// Rule recursive goes down to the first child that passes. Rule traversal (Weng et al., arXiv:2505.12398; on a chain it
// is block, Sun et al., arXiv:2403.10444) goes down to any child that may be visited, and up again where a node fails.
template <class T, class Op>
class CooperativeProgram : VerifyProgram<T, Op, By::acceptance> {
  using Base = VerifyProgram<T, Op, By::acceptance>;
  using Base::all_, Base::counters, Base::dense, Base::draft, Base::judged, Base::kIsChain, Base::live,
      Base::next_child, Base::node, Base::op_, Base::row, Base::part, Base::target, Base::token, Base::uniform_of,
      Base::work_;

 public:
  using Base::Base;

  SPECDEC_DEVICE void run() {
    block::by_one([] { here().below = 1.0, here().node = 0, here().meetings = 0; });
    descend();
    if (all_.out_logprobs != nullptr) meet();  // tables are overwritten then
    if (part().slice == 0) {
      // Where one table serves all nodes, it is another node's by now, unless the rule never goes up again: measured
      // anew, by this block, since it has the request alone then.
      if (!work_.ahead && !recursive()) measure_anew(target(node()));
      Base::finish(state().last, state().factor);
    }
    leave();
  }

 private:
  SPECDEC_DEVICE static Visited& here() { return *reinterpret_cast<Visited*>(block::memory().request); }
  SPECDEC_DEVICE static const State& state() { return here().state; }
  SPECDEC_DEVICE static int child() { return here().child; }
  SPECDEC_DEVICE State* states() const {
    return static_cast<State*>(work_.states) + (Base::request() * work_.slices + part().slice) * all_.rows;
  }

  SPECDEC_DEVICE bool recursive() const {
    if constexpr (kIsChain)
      return false;
    else
      return op_.rule == TreeRule::recursive;
  }

  // What every block wrote before, each sees behind.
  SPECDEC_DEVICE void meet() const {
    block::by_one([&] {
      ++here().meetings;
      if (work_.slices == 1) return;
      atomic_add(counters(), 1);
      while (load_relaxed(counters()) < here().meetings * uint32_t(work_.slices)) wait_a_little();
      fence_acquire(counters());
    });
  }
  // The last block of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    if (comes_last(counters() + 1, work_.slices) && block::rank() == 0) store_l2(counters(), 0u);
  }

  // The spans of a pass go around all blocks, so that a row keeps as many multiprocessors busy as there are; who has
  // less of one row has more of the next.
  SPECDEC_DEVICE int stride() const { return work_.slices * kWarps; }
  SPECDEC_DEVICE int first_span(int round) const {
    return (block::warp() * work_.slices + part().slice + round * (stride() - work_.spans % stride())) % stride();
  }
  // Measures the node that is visited and judges it; or all, before the root. These rules keep so many registers that
  // a whole span of float32 and the next one cannot be held.
  SPECDEC_DEVICE void judge_nodes() const {
    const auto now = [&](int i) { return i < live() && (kIsChain || work_.ahead || i == node()); };
    if (node() > 0) meet();  // all have read the tables of the node before
    for (int i = node(); now(i); ++i)
      Base::template measure_node<!std::is_same_v<T, float>>(
          i, [&] { return first_span(i % stride()); }, work_.spans, stride());
    meet();
    for (int i = node() + part().slice; now(i); i += work_.slices) Base::judge(i);
    meet();
  }

  // The sum of the weights of the ids of a node, `weigh(first, w)` giving those of eight. What each span has is left in
  // its table, at two places in turn: a block that is ahead begins the next pass while others still read the sums of
  // this one. They are added up in an order that does not depend on who went over which span.
  template <class F>
  SPECDEC_DEVICE float pass(const F& weigh) const {
    const int round = int(here().meetings);
    const auto sum_of = [&](const Table& table, int span) { return round % 2 ? table.winner(span) : table.time(span); };
    for (int span = first_span(round % stride()); span < work_.spans; span += stride()) {
      float mass = 0.0f;
      SPECDEC_ROLLED
      for (int u = 0; u < kLoads; ++u) {
        float w[kElements];
        weigh(span * kSpan + load_offset(u), w);
        SPECDEC_UNROLL
        for (int e = 0; e < kElements; ++e) mass += w[e];
      }
      mass = block::in_warp(mass, std::plus<>());
      if (block::lane() == 0) store_l2(sum_of(target(node()).table(), span), mass);
    }
    meet();
    float sum = 0.0f;
    SPECDEC_ROLLED
    for (int span = block::rank(); span < work_.spans; span += kThreads)
      sum += load_l2(sum_of(target(node()).table(), span));
    return block::reduce(sum, std::plus<>());
  }

  // To the node where the path ends.
  SPECDEC_DEVICE void descend() const {
    if (kIsChain) judge_nodes();
    for (;;) {
      // Rows of a tree are judged each when its node is visited; or all before the root.
      if (!kIsChain && here().below > 0.0 && (!work_.ahead || node() == 0)) judge_nodes();
      block::by_one([&] {
        Visited& here = CooperativeProgram::here();
        here.row = load_l2(judged() + here.node);
        here.state = here.below > 0.0 ? State{.path_prob = here.below, .last = row().usable ? here.node : live()}
                                      : load_l2(states() + here.node);
        here.below = 0.0, here.valid &= row().usable != 0;
      });
      const int found = next_child(node(), state().last);
      block::by_one([&] { here().child = found; });
      const bool bottom_up = !recursive() && node() > 0;
      if (!state().updated && (child() < live() || (bottom_up && state().path_prob < 1.0))) update_residual();
      if (child() < live())
        test();
      else if (!bottom_up || uniform_of(node()) < state().path_prob)
        return;
      else
        block::by_one([&] { here().node = Base::parent(node()); });
    }
  }

  // Mass and path probability of a node after its latest rejection.
  SPECDEC_DEVICE void update_residual() const {
    double mass = state().mass;
    if (row().drawn < 0) {  // a point mass is accepted where it is a child, and not touched by other children
      Base::set_residual(state().last, state().factor);
      const Probabilities probability = probabilities_of(row().target);
      mass = pass([&](int first, float (&w)[kElements]) { Base::weigh(probability, first, w); });
    }
    block::by_one([&] {
      Visited& here = CooperativeProgram::here();
      State& state = here.state;
      const double left = state.path_prob * mass / state.mass;
      state.mass = mass, state.updated = true;
      if (state.path_prob < 1.0) state.path_prob = left > 0.0 ? left / (left + 1.0 - state.path_prob) : 0.0;
    });
  }

  // Tests the child. Recursive: whether it passes. Traversal: the chance that it is visited. It counts as rejected, to
  // be read only once it is.
  SPECDEC_DEVICE void test() const {
    const double left_of_draft = draft_left();
    const bool fresh = kIsChain || child() == block::first_where(node() + 1, child(), [&](int earlier) {
                                     return Base::is_child(earlier, node()) && token(earlier) == token(child());
                                   });
    block::by_one([&] {
      Visited& here = CooperativeProgram::here();
      State& state = here.state;
      const int tested = here.child, id = int(token(tested));
      const double prob = Base::drafted_prob(node(), id);
      const double conditional = left_of_draft > 0.0 ? prob / left_of_draft : 0.0;
      double left = prob_of(row().target, target(node()).logit(id), id);
      if (!Base::is_certain()) left = fmax(left - prob / state.factor, 0.0);
      const double weight = fresh ? left : 0.0;
      // Strict: what the target excludes is never accepted, whatever the draft was declared to be.
      if (recursive())
        here.below = uniform_of(tested) * state.mass * conditional < weight ? 1.0 : 0.0;
      else if (weight > 0.0)
        here.below = fmin(1.0, state.path_prob * weight / state.mass / conditional);
      if (left_of_draft > 0.0 && state.path_prob > 0.0 && state.mass > 0.0) {
        const double taken = state.path_prob * left_of_draft / state.mass;
        state.factor = state.factor == INFINITY ? taken : 1.0 / (1.0 / state.factor + 1.0 / taken);
      }
      state.drafted += fresh ? prob : 0.0;
      state.last = tested, state.updated = false;
      store_l2(states() + here.node, state);
      // The row behind the last draft of a chain is read only if that is accepted.
      if (kIsChain && tested + 1 == live() && uniform_of(tested) >= here.below) here.below = 0.0;
      if (here.below > 0.0) here.node = tested;
    });
  }

  // What the tested children left of the draft's distribution: one minus what they took, summed anew where that would
  // have no digits left.
  SPECDEC_DEVICE double draft_left() const {
    if constexpr (!kIsChain) {
      const double left = op_.replacement || Base::is_certain() ? 1.0 : 1.0 - state().drafted;
      if (left >= kLeastDifference) return left;
      const Probabilities drafted = probabilities_of(row().draft);
      const double sum = pass([&](int first, float (&w)[kElements]) {
        draft(node()).load(first, w, drafted);
        Base::set_apart(state().last, first, w);
      });
      return sum < kNothingLeft ? 0.0 : sum;
    }
    return 1.0;
  }
};

// Which program a rule has.
template <class Op, class F>
  requires requires(const Op& op) { op.rule; }
auto with_program(const Op& op, const F& f) {
  return with_dtype(shape_of(op), [&](auto type) {
    using T = typename decltype(type)::type;
    if (cooperates(op)) return f(TypeOf<CooperativeProgram<T, Op>>());
    if (op.rule == decltype(op.rule)::coupled) return f(TypeOf<VerifyProgram<T, Op, By::race>>());
    return f(TypeOf<VerifyProgram<T, Op, std::is_same_v<Op, VerifyChain> ? By::acceptance : By::draw>>());
  });
}

}  // namespace specdec::cuda
