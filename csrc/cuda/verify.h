// `verify_chain` and `verify_tree`: a chain is a tree with one branch. What all rules have in common, and the rules
// that go by rows: token, walk and coupled.
#pragma once

#include "workspace.h"

namespace specdec::cuda {

// (target - draft)+ of an id, where the draft was divided by a factor; of a drafter that is certain of its token, all
// of the target. Of the rejected tokens themselves nothing is left: those are set apart.
struct Residual {
  Probabilities target, draft;
  bool certain;

  SPECDEC_DEVICE float operator()(float target_logit, float draft_logit) const {
    const float prob = target(target_logit);
    if (certain) return prob;
    const float left = prob - draft(draft_logit);
    return left > 0.0f ? left : 0.0f;  // nothing where the draft is no number
  }
};

// All that a rule asks of a row once it was judged.
struct alignas(16) Judged {
  Distribution target, draft;
  double prob = 0.0, draft_prob = 1.0;  // of the draft, under target and draft
  int drawn = -1;                       // the token that ends the path here, where that is known
  int next = -1;                        // the child where the path goes on
  bool tested = false;                  // its distributions are usable, and it has a draft if the rule tests drafts
};
static_assert(sizeof(Judged) <= kPlaceBytes);

// What tells whether the path goes on: a draft that its uniform accepts, a child that has the token drawn from the row,
// or one that has the first of the race of all ids.
enum class By { acceptance, draw, race };

template <class T, class Op, By kBy>
class VerifyProgram {
 public:
  SPECDEC_DEVICE VerifyProgram(const Op& op, const Workspace& work, const Part& part)
      : op_(op),
        all_(op.common),
        work_(work),
        b_(part.request),
        row_(part.row),
        slice_(part.slice),
        rows_(int(all_.rows)),
        live_(count_live()) {
    if (block::rank() == 0) describe_rows();
    block::sync();
  }

  // One row, by the blocks that share it. Rows come after those whose outcome decides on them, so where blocks start in
  // that order, those of rows that the path is known to pass by find that out and read nothing. The last block of the
  // row judges it, and whoever completes the path decides.
  SPECDEC_DEVICE void run() {
    if (row_ >= live_) return;
    // Asked once for all threads: it may change meanwhile.
    if (!work_.in_waves || !block::any(is_settled())) {
      const int begin = slice_ * work_.length, end = std::min(begin + work_.length, work_.spans);
      measure_node(row_, begin + block::warp(), end, kWarps);
    }
    const int code = when_all_came(counters() + row_, work_.slices, [&] { return is_settled() ? 2 : 1; });
    if (code == 0) return;
    const bool decides = code == 1 && settle(judge(row_));
    leave();
    if (!decides) return;
    int end = 0;
    for (int next = 0; next >= 0; next = fresh(&judged()[end].next)) end = next;
    end_at(end, 1.0, true);
  }

 protected:
  static constexpr bool kIsChain = std::is_same_v<Op, VerifyChain>;

  // Nothing that follows from the request is held in registers: it is read again.
  SPECDEC_DEVICE int64_t request() const {
    uint32_t request = uint32_t(b_);
    compute_here(request);
    return int64_t(request);
  }
  SPECDEC_DEVICE uint64_t seed() const { return uint64_t(given(all_.seed + request())); }
  SPECDEC_DEVICE uint64_t position() const { return uint64_t(given(all_.position + request())); }
  // Of the test of a node's token.
  SPECDEC_DEVICE double uniform_of(int node) const { return uniform(seed(), position(), node - 1); }
  SPECDEC_DEVICE Noise noise(int i) const { return {seed(), position(), kTarget | uint32_t(i) << 16}; }
  SPECDEC_DEVICE Noise coupled_noise(int i) const {
    return {seed(), position() + uint64_t(depth_of(i)), kCoupled | kTokenRace << 8};
  }

  // --- the tree: row i is that of node i, whose token was drafted from its parent's row ------------------------------

  SPECDEC_DEVICE const int64_t* parents() const {
    if constexpr (kIsChain)
      return nullptr;
    else
      return op_.parents + request() * rows_;
  }
  SPECDEC_DEVICE int parent(int node) const { return kIsChain ? node - 1 : int(given(parents() + node)); }
  SPECDEC_DEVICE int depth_of(int node) const {
    if (kIsChain) return node;
    int depth = 0;
    SPECDEC_ROLLED
    for (; node > 0; node = parent(node)) ++depth;
    return depth;
  }
  // The root has none: a chain's drafts begin with that of node 1.
  SPECDEC_DEVICE int64_t first_token() const {
    return request() * all_.token_strides[0] - (kIsChain ? all_.token_strides[1] : 0);
  }
  SPECDEC_DEVICE int64_t token(int node) const { return all_.tokens[first_token() + node * all_.token_strides[1]]; }
  SPECDEC_DEVICE bool is_token(int64_t id) const { return id >= 0 && id < all_.vocab; }

  // A chain ends before -1, or another id that is none; the root's row is requested even where there is no tree.
  SPECDEC_DEVICE int count_live() const {
    if constexpr (kIsChain)
      return block::first_where(1, int(op_.room(request())) + 1, [&](int node) { return !is_token(token(node)); });
    else
      return std::max(live_nodes(parents(), rows_), 1);
  }
  // A node whose token is none is no child.
  SPECDEC_DEVICE bool is_child(int child, int node) const { return parent(child) == node && is_token(token(child)); }
  // The first child of a node behind `after`; the number of nodes if there is none.
  SPECDEC_DEVICE int next_child(int node, int after) const {
    return block::first_where(after + 1, live_, [&](int child) { return is_child(child, node); });
  }

  // --- rows, and what is found of them -------------------------------------------------------------------------------

  SPECDEC_DEVICE void describe_rows() const {
    int64_t first_row = request() * all_.rows, begin = request() * all_.target.request_stride;
    if constexpr (kIsChain)
      if (op_.cu_rows != nullptr)
        first_row = given(op_.cu_rows + request()), begin = first_row * all_.target.row_stride;
    // Where a row that is not visited may not be measured, two tables serve all of a request.
    const int64_t first = 2 * (work_.ahead ? request() * rows_ : request());
    const int64_t floats = work_.ahead ? 2 * Table::floats(work_.spans) : 0;
    Rows* const rows = block::memory().rows;
    Rows& target = rows[kTargetRows] =
        described(all_.target, begin, all_.vocab, sampling_of(all_.sampling, int(request())), work_.table(first));
    target.floats_a_table = floats;
    rows[kRawRows] = target, rows[kRawRows].sampling = {};
    target.mask = mask_of(all_.processing, all_.vocab, first_row);
    target.adjustments = adjustments_of(all_.processing, request());
    target.drafts = all_.tokens, target.parents = parents();
    target.first_draft = first_token(), target.draft_stride = all_.token_strides[1];
    Rows& draft = rows[kDraftRows] =
        described(all_.draft, request() * all_.draft.request_stride, all_.vocab,
                  {all_.draft_stats ? 1.0f : all_.draft_scale(request())}, work_.table(first + 1));
    draft.floats_a_table = floats, draft.columns = {all_.target_to_draft, int(all_.draft.width)};
  }
  SPECDEC_DEVICE Row<T> target(int i) const { return {kTargetRows, i}; }
  SPECDEC_DEVICE Row<T> draft(int i) const { return {kDraftRows, i}; }
  SPECDEC_DEVICE Judged* judged() const { return static_cast<Judged*>(work_.places) + request() * rows_; }

  // Whether drafts were drawn from rows of logits; and whether the row that a node's were has to be measured.
  SPECDEC_DEVICE bool dense() const { return all_.draft.data != nullptr && !draft(0).sampling().greedy(); }
  SPECDEC_DEVICE bool measures_draft(int i) const {
    return dense() && all_.draft_stats == nullptr && !target(i).sampling().greedy() && next_child(i, i) < live_;
  }

  // The spans `span`, span + stride, ... before `end` of all that is measured of a node, by a warp.
  template <bool kWhole = true>
  SPECDEC_DEVICE void measure_node(int i, int span, int end, int stride) const {
    constexpr bool kRace = kBy == By::race;
    const int rows = kBy == By::acceptance && measures_draft(i) ? 2 : 1;
    SPECDEC_ROLLED
    for (int which = kTargetRows; which < rows; ++which)
      measure<kRace, kWhole>(Row<T>{Which(which), i}, span, end, stride, kRace ? coupled_noise(i) : Noise{});
  }

  // What the drafts of row i were drawn from: by the scalars handed over (a greedy drafter's leave `d`, a point mass,
  // as it is), or by the softmax of a row whose table is made.
  SPECDEC_DEVICE Distribution draft_distribution(int i, Distribution d) const {
    if (all_.draft_stats == nullptr) return distribution_of(draft(i));
    const float* stats = all_.draft_stats + 3 * (request() * all_.draft_rows + i);
    const float scale = given(stats);
    if (scale != INFINITY) d = {scale, given(stats + 1), 0.0f, given(stats + 2)};
    return d;
  }

  // Their probability of a token.
  SPECDEC_DEVICE double drafted_prob(int i, const Distribution& d, int id) const {
    return d.argmax >= 0 || !dense() ? 1.0 : prob_of(d, draft(i).logit(id), id);
  }

  // The weights of ids of row i from `first` on: what is left of the target.
  template <int kCount>
  SPECDEC_DEVICE void weigh(int i, const Residual& residual, int first, float (&w)[kCount]) const {
    float y[kCount] = {};
    target(i).load(first, w);
    if (!residual.certain) draft(i).load(first, y);
    SPECDEC_UNROLL
    for (int k = 0; k < kCount; ++k) w[k] = residual(w[k], y[k]);
  }
  // The token that ends the step in row i, by the two-level race: of what rejections left, and of the target's own
  // probabilities where that is nothing, or nothing was rejected. `set_apart(first, w)` of four weights.
  template <class F>
  SPECDEC_DEVICE int draw_after(int i, const Distribution& d, Residual residual, bool rejected,
                                const F& set_apart) const {
    for (;;) {
      residual.certain |= !rejected;
      const int drawn = draw(target(i), d, noise(i), [&](int first, float (&w)[4]) {
        weigh(i, residual, first, w);
        if (rejected) set_apart(first, w);
      });
      if (drawn != kNobody || !rejected) return drawn;
      rejected = false;
    }
  }

  // --- results -------------------------------------------------------------------------------------------------------

  // The path to a node, where `drawn` ends it. `found` has the distribution of each row.
  template <class State>
  SPECDEC_DEVICE void write_path(int end, int drawn, bool valid, const State* found) const {
    const int depth = depth_of(end);
    if (block::rank() == 0) all_.out_accepted[request()] = depth, all_.out_valid[request()] = valid;
    SPECDEC_ROLLED
    for (int i = rows_ - 1; i > depth; --i) write(i, -1, -1, found);
    int64_t id = drawn;
    SPECDEC_ROLLED
    for (int i = depth, node = end; i >= 0; --i) {
      write(i, node, id, found);
      if (i > 0) id = token(node), node = parent(node);
    }
  }
  // Token i of the results, which follows a node; no node behind the end of the path. The log-probability under the
  // plain softmax takes measuring the row anew.
  template <class State>
  SPECDEC_DEVICE void write(int i, int node, int64_t id, const State* found) const {
    const int64_t at = request() * rows_ + i;
    if (block::rank() == 0) {
      all_.out_tokens[at] = id;
      if constexpr (!kIsChain) op_.out_nodes[at] = node;
    }
    if (all_.out_logprobs == nullptr) return;
    float logprob = NAN, raw_logprob = NAN;
    if (node >= 0) {
      const Row<T> raw{kRawRows, node};
      measure_anew(raw);
      const Mass mass = mass_of(raw);
      if (mass.valid()) raw_logprob = (raw.logit(int(id)) - mass.top) - logf(mass.sum);
      const Distribution d = fresh(found + node).target;
      if (d.valid) logprob = float(d.log_prob(target(node).logit(int(id)), int(id)));
    }
    if (block::rank() == 0) all_.out_logprobs[at] = logprob, all_.out_raw_logprobs[at] = raw_logprob;
  }

  // --- by rows -------------------------------------------------------------------------------------------------------
  //
  // A row is settled once it was judged, or once the path is known to pass it by. A request has a bit for each row in
  // words and their number, and whoever settles the last ones knows that the path is complete, and decides. That is as
  // soon as its last row was judged: rows behind the end of a chain, or beside the path through a tree, are passed by.
  SPECDEC_DEVICE int words() const { return (rows_ + 31) / 32; }
  SPECDEC_DEVICE uint32_t* counters() const { return work_.counters + request() * (rows_ + 2 + words()); }
  SPECDEC_DEVICE uint32_t* rows_done() const { return counters() + rows_; }
  SPECDEC_DEVICE uint32_t* rows_settled() const { return counters() + rows_ + 1; }
  SPECDEC_DEVICE uint32_t* settled_bits() const { return counters() + rows_ + 2; }
  SPECDEC_DEVICE bool is_settled() const { return (glance(settled_bits() + row_ / 32) >> row_ % 32 & 1) != 0; }

  // Judges a row whose tables are made, and writes what a rule asks of it. The child where the path goes on, or -1.
  SPECDEC_DEVICE int judge(int i) const {
    const Row<T> row = target(i);
    Judged found;
    found.target = distribution_of(row);
    found.drawn = found.target.argmax, found.tested = found.target.valid;
    if constexpr (kBy == By::acceptance) {
      found.tested &= i + 1 < live_;
      // A greedy target accepts its argmax and emits its argmax: there no distribution of the draft matters.
      const int id = found.draft.argmax = i + 1 < live_ ? int(token(i + 1)) : -1;
      if (dense() && found.tested && found.target.argmax < 0) found.draft = draft_distribution(i, found.draft);
      if (found.tested && found.draft.valid) {
        found.prob = prob_of(found.target, row.logit(id), id);
        found.draft_prob = drafted_prob(i, found.draft, id);
        // Strict: a token the target gives probability 0 is never accepted, even by uniform 0.
        if (uniform_of(i + 1) * found.draft_prob < found.prob) found.next = i + 1;
      }
      found.tested &= found.draft.valid && found.draft_prob < INFINITY;
      if (!found.tested) found.next = -1;
    } else {
      if (found.drawn < 0)
        found.drawn =
            kBy == By::race ? flat_race(row, found.target, coupled_noise(i)) : draw_from(row, found.target, noise(i));
      int child = found.tested ? next_child(i, i) : live_;
      while (child < live_ && token(child) != found.drawn) child = next_child(i, child);
      if (child < live_) found.next = child;
    }
    if (block::rank() == 0) put(judged() + i, found);
    return found.next;
  }

  // Whether the path passes a row by, since it goes on from this one to `next`: it is below this row, but not below
  // `next`, nor that itself.
  SPECDEC_DEVICE bool passed_by(int node, int next) const {
    if constexpr (kIsChain) return node > row_ && next < 0 && !op_.independent;
    int below = node;
    while (node > row_) below = node, node = parent(node);
    return node == row_ && below != row_ && below != next;
  }

  // Settles this row, and those that are passed by. Whether those were the last of the request.
  SPECDEC_DEVICE bool settle(int next) const {
    int more = 0;
    block::sync();  // what was judged is written
    SPECDEC_ROLLED
    for (int word = block::warp(); 32 * word < live_; word += kWarps) {
      const uint32_t bits = block::bits([&](int bit) {
        const int node = 32 * word + bit;
        return node < live_ && (node == row_ || passed_by(node, next));
      });
      if (block::lane() == 0 && bits != 0) more += std::popcount(bits & ~set_bits(settled_bits() + word, bits));
    }
    more = block::reduce(more, std::plus<>());
    return block::of_first(block::rank() == 0 && more > 0 &&
                           int(add_to(rows_settled(), uint32_t(more))) + more == live_);
  }

  // Once all blocks of a row have come. The last row of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    if (block::rank() != kThreads - 1) return;  // not who has most to do
    if (come_to(rows_done(), uint32_t(live_ - 1)) != uint32_t(live_ - 1)) return;
    acquire();
    put(rows_settled(), 0u);
    SPECDEC_ROLLED
    for (int word = 0; word < words(); ++word) put(settled_bits() + word, 0u);
  }

  // The path ends in a row, with a probability, and with its draft rejected where it was tested and could be accepted.
  // `valid`: whether all other rows that were read are.
  SPECDEC_DEVICE void end_at(int end, double path_prob, bool can_go_on, bool valid = true) const {
    const Judged last = fresh(judged() + end);
    int drawn = last.drawn;
    if constexpr (kBy == By::acceptance)
      if (last.target.argmax < 0) {
        const Residual residual = residual_of(last, path_prob);
        drawn = draw_after(end, last.target, residual, can_go_on && last.tested,
                           [&](int first, auto& w) { set_apart(last, first, w); });
      }
    write_path(end, drawn, valid && last.target.valid && (last.tested || end + 1 == live_), judged());
    if constexpr (kIsChain) {
      int independent = 0;
      SPECDEC_ROLLED
      for (int i = block::rank(); op_.independent && i + 1 < live_; i += kThreads)
        independent += fresh(&judged()[i].next) >= 0;
      independent = op_.independent ? block::reduce(independent, std::plus<>()) : -1;
      if (block::rank() != 0) return;
      op_.out_counters[2 * request()] = live_ - 1, op_.out_counters[2 * request() + 1] = independent;
    }
  }
  // (target - draft / path_prob)+, and nothing of a draft that is a point mass.
  SPECDEC_DEVICE static Residual residual_of(const Judged& row, double path_prob) {
    return {probabilities_of(row.target), probabilities_of(row.draft, path_prob), row.draft.argmax >= 0};
  }
  template <int kCount>
  SPECDEC_DEVICE static void set_apart(const Judged& row, int first, float (&w)[kCount]) {
    if (row.draft.argmax >= 0) set_at(w, row.draft.argmax - first, 0.0f);
  }

  const Op& op_;
  const Verification& all_;
  const Workspace& work_;
  const int b_, row_, slice_, rows_;
  const int live_;
};

}  // namespace specdec::cuda
