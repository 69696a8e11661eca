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

// All that the threads of a block have alike, in its memory: it would take half of their registers.
struct Visited {
  Judged row;
  State state;
  uint32_t meetings;
  bool valid;  // whether all rows that were visited are usable
};
static_assert(sizeof(Visited) <= sizeof(BlockMemory::visited));

// Rule recursive goes down to the first child that passes. Rule traversal (Weng et al., arXiv:2505.12398; on a chain it
// is block, Sun et al., arXiv:2403.10444) goes down to any child that may be visited, and up again where a node fails.
template <class T, class Op>
class CrewProgram : VerifyProgram<T, Op, By::acceptance> {
  using Base = VerifyProgram<T, Op, By::acceptance>;
  using Base::all_, Base::counters, Base::dense, Base::draft, Base::judged, Base::kIsChain, Base::live,
      Base::next_child, Base::op_, Base::slice_, Base::target, Base::token, Base::uniform_of, Base::work_;

 public:
  using Base::Base;

  SPECDEC_DEVICE void run() {
    change([](Visited& here) { here.meetings = 0, here.valid = true; });
    const int node = descend();
    if (all_.out_logprobs != nullptr) meet();  // tables are overwritten then
    if (slice_ == 0) {
      // Its table was another node's since, where one table serves all nodes: then there are no others in the crew.
      if (!work_.ahead && !recursive()) measure_anew(target(node));
      Base::finish(node, state().last, state().factor, here().valid);
    }
    leave();
  }

 private:
  SPECDEC_DEVICE static Visited& here() { return *reinterpret_cast<Visited*>(block::memory().visited); }
  SPECDEC_DEVICE static const State& state() { return here().state; }
  // Changes it, by one thread. What that leaves in the workspace no other reads.
  template <class F>
  SPECDEC_DEVICE static void change(const F& f) {
    block::sync();  // all have read what is overwritten now
    if (block::rank() == 0) f(here());
    block::sync();
  }
  SPECDEC_DEVICE State* states() const {
    return static_cast<State*>(work_.states) + (Base::request() * work_.slices + slice_) * all_.rows;
  }

  SPECDEC_DEVICE bool recursive() const {
    if constexpr (kIsChain)
      return false;
    else
      return op_.rule == TreeRule::recursive;
  }

  // What every block wrote before, each sees behind.
  SPECDEC_DEVICE void meet() const {
    change([&](Visited& here) {
      ++here.meetings;
      if (work_.slices == 1) return;
      add_to(counters(), 1);
      while (glance(counters()) < here.meetings * uint32_t(work_.slices)) wait_a_little();
      acquire();
    });
  }
  // The last block of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    if (comes_last(counters() + 1, work_.slices) && block::rank() == 0) put(counters(), 0u);
  }

  // The spans of a pass go around all blocks, so that a row keeps as many multiprocessors busy as there are; who has
  // less of one row has more of the next.
  SPECDEC_DEVICE int stride() const { return work_.slices * kWarps; }
  SPECDEC_DEVICE int first_span(int round) const {
    return (block::warp() * work_.slices + slice_ + round * (stride() - work_.spans % stride())) % stride();
  }
  // Measures some nodes and judges them. Rules by crews keep so many registers that a whole span of float32 and the
  // next one cannot be held.
  SPECDEC_DEVICE void judge_nodes(int begin, int end) const {
    if (begin > 0) meet();  // all have read the tables of the node before
    for (int i = begin; i < end; ++i)
      Base::template measure_node<!std::is_same_v<T, float>>(i, first_span(i % stride()), work_.spans, stride());
    meet();
    for (int i = begin + slice_; i < end; i += work_.slices) Base::judge(i);
    meet();
  }

  // The sum of the weights of the ids of a node, `weigh(first, w)` giving those of eight. What each span has is left in
  // its table, at two places in turn: a block that is ahead begins the next pass while others still read the sums of
  // this one. They are added up in an order that does not depend on who went over which span.
  template <class F>
  SPECDEC_DEVICE float pass(int node, const F& weigh) const {
    const Table table = target(node).table();
    const int round = int(here().meetings);
    float* const sums = round % 2 == 0 ? table.time(0) : table.winner(0);
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
      if (block::lane() == 0) put(sums + span, mass);
    }
    meet();
    float sum = 0.0f;
    SPECDEC_ROLLED
    for (int span = block::rank(); span < work_.spans; span += kThreads) sum += fresh(sums + span);
    return block::reduce(sum, std::plus<>());
  }

  // The node where the path ends.
  SPECDEC_DEVICE int descend() const {
    if (kIsChain) judge_nodes(0, live());
    int node = 0;
    double below = 1.0;
    for (;;) {
      // Rows of a tree are judged each when its node is visited; or all before the root.
      if (!kIsChain && below > 0.0 && (!work_.ahead || node == 0)) judge_nodes(node, work_.ahead ? live() : node + 1);
      change([&](Visited& here) {
        here.row = fresh(judged() + node);
        here.state =
            below > 0.0 ? State{.path_prob = below, .last = here.row.usable ? node : live()} : fresh(states() + node);
        here.valid &= here.row.usable != 0;
      });
      const int child = next_child(node, state().last);
      const bool bottom_up = !recursive() && node > 0;
      if (!state().updated && (child < live() || (bottom_up && state().path_prob < 1.0))) update_residual(node);
      if (child == live()) {
        if (!bottom_up || uniform_of(node) < state().path_prob) return node;
        node = Base::parent(node), below = 0.0;
        continue;
      }
      below = test(node, child);
      if (below > 0.0) node = child;
    }
  }

  // Mass and path probability of a node after its latest rejection.
  SPECDEC_DEVICE void update_residual(int node) const {
    double mass = state().mass;
    if (here().row.drawn < 0) {  // a point mass is accepted where it is a child, and not touched by other children
      const Residual residual = Base::residual_of(node, here().row, state().last, state().factor);
      const Probabilities probability = probabilities_of(here().row.target);
      mass = pass(node, [&](int first, float (&w)[kElements]) { Base::weigh(residual, probability, first, w); });
    }
    change([&](Visited& here) {
      State& state = here.state;
      const double left = state.path_prob * mass / state.mass;
      state.mass = mass, state.updated = true;
      if (state.path_prob < 1.0) state.path_prob = left > 0.0 ? left / (left + 1.0 - state.path_prob) : 0.0;
    });
  }

  // Tests a child. Recursive: 1 if it passes, else 0. Traversal: the chance that it is visited; it counts as rejected,
  // to be read only once it is.
  SPECDEC_DEVICE double test(int node, int child) const {
    const int id = int(token(child));
    const Judged& row = here().row;
    const bool fresh = kIsChain || child == block::first_where(node + 1, child, [&](int earlier) {
                                     return Base::is_child(earlier, node) && token(earlier) == id;
                                   });
    const double left_of_draft = draft_left(node);
    const double prob = Base::drafted_prob(node, row.draft, id);
    const double conditional = left_of_draft > 0.0 ? prob / left_of_draft : 0.0;
    double left = prob_of(row.target, target(node).logit(id), id);
    if (!Base::is_certain(row)) left = fmax(left - prob / state().factor, 0.0);
    const double weight = fresh ? left : 0.0;
    // Strict: what the target excludes is never accepted, whatever the draft was declared to be.
    double below = 0.0;
    if (recursive())
      below = uniform_of(child) * state().mass * conditional < weight ? 1.0 : 0.0;
    else if (weight > 0.0)
      below = fmin(1.0, state().path_prob * weight / state().mass / conditional);
    if (recursive() && below > 0.0) return below;
    change([&](Visited& here) {
      State& state = here.state;
      if (left_of_draft > 0.0 && state.path_prob > 0.0 && state.mass > 0.0) {
        const double taken = state.path_prob * left_of_draft / state.mass;
        state.factor = state.factor == INFINITY ? taken : 1.0 / (1.0 / state.factor + 1.0 / taken);
      }
      state.drafted += fresh ? prob : 0.0;
      state.last = child, state.updated = false;
      put(states() + node, state);
    });
    // The row behind the last draft of a chain is read only if that is accepted.
    return kIsChain && child + 1 == live() && uniform_of(child) >= below ? 0.0 : below;
  }

  // What the tested children left of the draft's distribution: one minus what they took, summed anew where that would
  // have no digits left.
  SPECDEC_DEVICE double draft_left(int node) const {
    if constexpr (!kIsChain) {
      const double left = op_.replacement || Base::is_certain(here().row) ? 1.0 : 1.0 - state().drafted;
      if (left >= kLeastDifference) return left;
      const Probabilities drafted = probabilities_of(here().row.draft);
      const double sum = pass(node, [&](int first, float (&w)[kElements]) {
        draft(node).load(first, w, drafted);
        Base::set_apart(node, state().last, first, w);
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
    if (by_crews(op)) return f(TypeOf<CrewProgram<T, Op>>());
    if (op.rule == decltype(op.rule)::coupled) return f(TypeOf<VerifyProgram<T, Op, By::race>>());
    return f(TypeOf<VerifyProgram<T, Op, std::is_same_v<Op, VerifyChain> ? By::acceptance : By::draw>>());
  });
}

}  // namespace specdec::cuda
