// `verify_chain` and `verify_tree`: a chain is a tree with one branch. What all rules have in common, and the rules
// that go by rows: token, walk and coupled.
#pragma once

#include "distribution.h"

namespace specdec::cuda {

// What is known of a row once it was judged.
struct alignas(16) Judged {
  Distribution target, draft;
  int drawn;   // the token that ends the path here, where that is known; else -1
  int next;    // the child where the path goes on; else -1
  int usable;  // whether its distributions are: the target's, and that of its children
};
static_assert(sizeof(Judged) <= kJudgedBytes);

// What rejecting children of a node one after the other leaves of its target, up to a factor: (target - draft /
// factor)+ with one number, and nothing of the rejected tokens, each of which was rejected since less was left of it
// than the draft's probability. So it does not matter that siblings drawn without replacement were not drawn from
// those. Of a drafter that is certain of its tokens, and where nothing was rejected, it is all of the target but those.
struct Residual {
  Probabilities draft;
  bool certain;
  int last;  // the last child that was tested; the node itself if none was

  SPECDEC_DEVICE float operator()(float prob, float draft_logit) const {
    if (certain) return prob;
    const float left = prob - draft(draft_logit);
    return left > 0.0f ? left : 0.0f;  // nothing where the draft is no number
  }
};

// What the threads of a block have alike of their request, in its memory: it would take half of their registers.
struct Request {
  Part part;
  int live;    // rows that may be visited
  int node;    // that is visited, or where the path ends
  bool valid;  // whether all rows that were visited are usable
  Judged row;  // its own, or the one that is judged
  Residual residual;
  Judged* judged;  // of all rows
  uint32_t* counters;
  int64_t* tokens;  // results: a loop would read parameters before it begins, and spill them
  int32_t* nodes;
  float *logprobs, *raw_logprobs;
};

// What tells whether the path goes on: a draft that its uniform accepts, a child that has the token drawn from the row,
// or one that has the first of the race of all ids.
enum class By { acceptance, draw, race };

template <class T, class Op, By kBy>
class VerifyProgram {
 public:
  SPECDEC_DEVICE VerifyProgram(const Op& op, const Plan& work, const Part& part)
      : op_(op), all_(op.common), work_(work), rows_(int(all_.rows)) {
    block::by_one([&] {
      here().part = part, here().valid = true, here().judged = static_cast<Judged*>(work_.judged) + request() * rows_;
      here().counters = work_.counters + request() * (rows_ + 2 + words());
      describe_rows();
    });
    const int live = count_live();
    block::by_one([&] { here().live = live; });
  }

  // One row, by the blocks that share it. Rows come after those whose outcome decides on them, so where blocks start in
  // that order, those of rows that the path is known to pass by find that out and read nothing. The last block of the
  // row judges it, and whoever completes the path decides.
  SPECDEC_DEVICE void run() {
    if (part().row >= live()) return;
    // Asked once for all threads: it may change meanwhile.
    if (!work_.in_waves || !block::any(is_settled())) {
      const int begin = part().slice * work_.length, end = std::min(begin + work_.length, work_.spans);
      measure_node(part().row, [&] { return begin + block::warp(); }, end, kWarps);
    }
    if (!comes_last(counters() + part().row, work_.slices)) return;
    const bool decides = !block::any(is_settled()) && settle(judge(part().row));
    leave();
    if (!decides) return;
    int end = 0;
    for (int next = 0; next >= 0; next = load_l2(&judged()[end].next)) end = next;
    block::by_one([&] { here().row = load_l2(judged() + end), here().node = end; });
    finish(std::min(end + 1, live() - 1), 1.0);
  }

 protected:
  static constexpr bool kIsChain = std::is_same_v<Op, VerifyChain>;

  static_assert(sizeof(Request) <= sizeof(BlockMemory::request));
  SPECDEC_DEVICE static Request& here() { return *reinterpret_cast<Request*>(block::memory().request); }
  SPECDEC_DEVICE static const Part& part() { return here().part; }
  SPECDEC_DEVICE static int64_t request() { return part().request; }
  SPECDEC_DEVICE static int live() { return here().live; }
  SPECDEC_DEVICE static int node() { return here().node; }
  SPECDEC_DEVICE static const Judged& row() { return here().row; }
  SPECDEC_DEVICE static Judged* judged() { return here().judged; }
  SPECDEC_DEVICE uint64_t seed() const { return uint64_t(given(all_.seed + request())); }
  SPECDEC_DEVICE uint64_t position() const { return uint64_t(given(all_.position + request())); }
  // Of the test of a node's token.
  SPECDEC_DEVICE double uniform_of(int node) const { return uniform(seed(), position(), node - 1); }
  SPECDEC_DEVICE Noise noise(int i) const { return {seed(), position(), kTarget | uint32_t(i) << 16}; }
  SPECDEC_DEVICE Noise coupled_noise(int i) const {
    return {seed(), position() + uint64_t(depth_of(i)), kCoupled | kTokenRace << 8};
  }

  // Row i is that of node i, whose token was drafted from its parent's row.
  SPECDEC_DEVICE static const int64_t* parents() { return block::memory().rows[kTargetRows].parents; }
  SPECDEC_DEVICE static int parent(int node) { return kIsChain ? node - 1 : int(given(parents() + node)); }
  SPECDEC_DEVICE static int64_t token(int node) { return block::memory().rows[kTargetRows].draft(node); }
  SPECDEC_DEVICE bool is_token(int64_t id) const { return id >= 0 && id < all_.vocab; }
  SPECDEC_DEVICE int depth_of(int node) const {
    if (kIsChain) return node;
    int depth = 0;
    SPECDEC_ROLLED
    for (; node > 0; node = parent(node)) ++depth;
    return depth;
  }

  // A chain ends before -1, or another id that is none. The root's row is always evaluated, even where the parents
  // describe no valid tree, so that every request gets a token.
  SPECDEC_DEVICE int count_live() const {
    if constexpr (kIsChain)
      return block::first_where(1, int(op_.num_drafts(request())) + 1, [&](int i) { return !is_token(token(i)); });
    else
      return std::max(live_nodes(parents(), rows_), 1);
  }
  // A node whose token is none is no child.
  SPECDEC_DEVICE bool is_child(int child, int node) const { return parent(child) == node && is_token(token(child)); }
  // The first child of a node behind `after`; the number of nodes if there is none.
  SPECDEC_DEVICE int next_child(int node, int after) const {
    if (kIsChain) return after == node ? node + 1 : live();
    return block::first_where(after + 1, live(), [&](int child) { return is_child(child, node); });
  }

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
        described(all_.target, begin, all_.vocab, sampling_of(all_.sampling, int(request())), work_, first);
    target.floats_a_table = floats;
    rows[kRawRows] = target, rows[kRawRows].sampling = {};
    target.mask = mask_of(all_.processing, all_.vocab, first_row);
    target.adjustments = adjustments_of(all_.processing, request());
    target.drafts = all_.tokens, target.draft_stride = all_.token_strides[1];
    target.first_draft = request() * all_.token_strides[0];
    if constexpr (kIsChain)
      target.first_draft -= target.draft_stride;  // the root has none: a chain's drafts begin with that of node 1
    else
      target.parents = op_.parents + request() * rows_;
    Rows& draft = rows[kDraftRows] =
        described(all_.draft, request() * all_.draft.request_stride, all_.vocab,
                  {all_.draft_stats ? 1.0f : all_.draft_scale(request())}, work_, first + 1);
    draft.floats_a_table = floats, draft.columns = {all_.target_to_draft, int(all_.draft.width)};
  }
  SPECDEC_DEVICE Row<T> target(int i) const { return {kTargetRows, i}; }
  SPECDEC_DEVICE Row<T> draft(int i) const { return {kDraftRows, i}; }

  // Whether drafts were drawn from rows of logits; and whether the row that a node's were has to be measured.
  SPECDEC_DEVICE bool dense() const { return all_.draft.data != nullptr && !draft(0).sampling().greedy(); }
  SPECDEC_DEVICE bool measures_draft(int i) const {
    return dense() && all_.draft_stats == nullptr && !target(i).sampling().greedy() && next_child(i, i) < live();
  }

  // The spans first(), first() + stride, ... before `end` of all that is measured of a node, by a warp. The first is
  // computed for each row anew, or it would be spilled.
  template <bool kWhole = true, class First>
  SPECDEC_DEVICE void measure_node(int i, const First& first, int end, int stride) const {
    constexpr bool kRace = kBy == By::race;
    const int rows = kBy == By::acceptance && measures_draft(i) ? 2 : 1;
    SPECDEC_ROLLED
    for (int which = kTargetRows; which < rows; ++which)
      measure<kRace, kWhole>(Row<T>{Which(which), i}, first(), end, stride, kRace ? coupled_noise(i) : Noise{});
  }

  // What the drafts of row i were drawn from: by the scalars handed over (a greedy drafter's leave a point mass, as it
  // is), or by the softmax of a row whose table is made.
  SPECDEC_DEVICE void set_draft(int i) const {
    if (all_.draft_stats == nullptr) return find_distribution(draft(i), here().row.draft);
    block::by_one([&] {
      const float* stats = all_.draft_stats + 3 * (request() * all_.draft_rows + i);
      const float scale = given(stats);
      if (scale != INFINITY) here().row.draft = {scale, given(stats + 1), 0.0f, given(stats + 2)};
    });
  }

  SPECDEC_DEVICE bool is_certain() const { return !dense() || row().draft.argmax >= 0; }
  // Of the drafts of row i, the probability of a token.
  SPECDEC_DEVICE double drafted_prob(int i, int id) const {
    return is_certain() ? 1.0 : prob_of(row().draft, draft(i).logit(id), id);
  }

  // Judges a row whose tables are made, and writes what a rule asks of it. The child where the path goes on, or -1.
  SPECDEC_DEVICE int judge(int i) const {
    Judged& found = here().row;
    find_distribution(target(i), found.target);
    int child = next_child(i, i);
    block::by_one([&] {
      found.draft = {.argmax = child < live() ? int(token(child)) : -1};
      found.drawn = found.target.argmax, found.next = -1, found.usable = found.target.valid;
    });
    if constexpr (kBy == By::acceptance) {
      bool usable = found.usable;
      // A greedy target accepts its argmax and emits its argmax: there no distribution of the draft matters.
      if (dense() && found.draft.argmax >= 0 && found.usable && found.drawn < 0) {
        set_draft(i);
        usable = found.draft.valid;
        for (int each = next_child(i, i); each < live() && usable; each = next_child(i, each))
          usable = drafted_prob(i, int(token(each))) < INFINITY;
      }
      block::by_one([&] {
        found.usable = usable;
        if (kIsChain && i + 1 < live() && found.usable) {
          const int id = int(token(i + 1));
          const double prob = prob_of(found.target, target(i).logit(id), id);
          // Strict: a token the target gives probability 0 is never accepted, even by uniform 0.
          if (prob > 0.0 && uniform_of(i + 1) * drafted_prob(i, id) < prob) found.next = i + 1;
        }
        store_l2(judged() + i, found);
      });
    } else {
      int drawn = found.drawn;
      if (drawn < 0)
        drawn = kBy == By::race ? flat_race(target(i), found.target, coupled_noise(i))
                                : draw_from(target(i), found.target, noise(i));
      child = next_child(i, i);
      while (child < live() && token(child) != drawn) child = next_child(i, child);
      block::by_one([&] {
        found.drawn = drawn;
        if (child < live() && found.usable) found.next = child;
        store_l2(judged() + i, found);
      });
    }
    return found.next;
  }

  SPECDEC_DEVICE void set_residual(int last, double factor) const {
    block::by_one(
        [&] { here().residual = {probabilities_of(row().draft, factor), last == node() || is_certain(), last}; });
  }
  // The weights of ids from `first` on.
  template <int kCount>
  SPECDEC_DEVICE void weigh(const Probabilities& probability, int first, float (&w)[kCount]) const {
    const Residual& residual = here().residual;
    float y[kCount] = {};
    target(node()).load(first, w, probability);
    if (!residual.certain) draft(node()).load(first, y);
    SPECDEC_UNROLL
    for (int k = 0; k < kCount; ++k) w[k] = residual(w[k], y[k]);
    set_apart(residual.last, first, w);
  }
  // Nothing is left of the tokens of the children up to `last`.
  template <int kCount>
  SPECDEC_DEVICE void set_apart(int last, int first, float (&w)[kCount]) const {
    constexpr int kOfWarp = kCount * kLanes;
    const int begin = first / kOfWarp * kOfWarp;
    const auto next = [&](int after) {
      if (kIsChain) return after == node() ? after + 1 : last + 1;
      return block::first_where(after + 1, last + 1, [&](int child) {
        return is_child(child, node()) && token(child) >= begin && token(child) - begin < kOfWarp;
      });
    };
    SPECDEC_ROLLED
    for (int child = next(node()); child <= last; child = next(child)) set_at(w, int(token(child)) - first, 0.0f);
  }

  // The token that ends the step at the node, by the two-level race: of what rejections left, and of the target's own
  // probabilities where that is nothing.
  SPECDEC_DEVICE int draw_last(int last, double factor) const {
    set_residual(row().usable ? last : node(), factor);
    for (;;) {
      const auto left = [&](int first, float (&w)[4], const auto& probability) { weigh(probability, first, w); };
      const Distribution d = row().target;
      const int drawn = draw(target(node()), d, noise(node()), left);
      if (drawn != kNobody || here().residual.last == node()) return drawn;
      block::by_one([&] { here().residual.certain = true, here().residual.last = node(); });
    }
  }

  // The path ends at the node, whose children up to `last` were rejected.
  SPECDEC_DEVICE void finish(int last, double factor) const {
    int id = row().drawn;
    if (kBy == By::acceptance && id < 0) id = draw_last(last, factor);
    const int depth = depth_of(node());
    block::by_one([&] {
      const int64_t first = request() * rows_;
      here().tokens = all_.out_tokens + first;
      if constexpr (!kIsChain) here().nodes = op_.out_nodes + first;
      if (all_.out_logprobs != nullptr)
        here().logprobs = all_.out_logprobs + first, here().raw_logprobs = all_.out_raw_logprobs + first;
      all_.out_accepted[request()] = depth, all_.out_valid[request()] = here().valid && row().usable != 0;
      if constexpr (kIsChain) {
        int independent = op_.independent ? 0 : -1;
        for (int i = 0; op_.independent && i + 1 < live(); ++i) independent += load_l2(&judged()[i].next) >= 0;
        op_.out_counters[2 * request()] = live() - 1, op_.out_counters[2 * request() + 1] = independent;
      }
      SPECDEC_ROLLED
      for (int i = rows_ - 1, node = here().node; i >= 0; --i) {
        const bool on_path = i <= depth;
        store_l2(here().tokens + i, int64_t(on_path ? id : -1));
        if (!kIsChain) store_l2(here().nodes + i, on_path ? node : -1);
        if (on_path && i > 0) id = int(token(node)), node = parent(node);
      }
    });
    SPECDEC_ROLLED
    for (int i = 0; all_.out_logprobs != nullptr && i < rows_; ++i) write_logprobs(i);
  }
  // Of token i of the results, which is written.
  SPECDEC_DEVICE void write_logprobs(int i) const {
    const int id = int(load_l2(here().tokens + i)), node = kIsChain ? i : load_l2(here().nodes + i);
    float logprob = NAN;
    if (id >= 0) {
      const Distribution d = load_l2(&judged()[node].target);
      if (d.valid) logprob = float(d.log_prob(target(node).logit(id), id));
    }
    if (block::rank() == 0) store_l2(here().logprobs + i, logprob);
    if (id >= 0) logprob = logprob_anew(Row<T>{kRawRows, node}, id);
    if (block::rank() == 0) store_l2(here().raw_logprobs + i, logprob);
  }

  // A row is settled once it was judged, or once the path is known to pass it by. A request has a bit for each row in
  // words and their number, and whoever settles the last ones knows that the path is complete, and decides. That is as
  // soon as its last row was judged: rows behind the end of a chain, or beside the path through a tree, are passed by.
  SPECDEC_DEVICE int words() const { return words_of(rows_); }
  SPECDEC_DEVICE static uint32_t* counters() { return here().counters; }
  SPECDEC_DEVICE uint32_t* rows_done() const { return counters() + rows_; }
  SPECDEC_DEVICE uint32_t* rows_settled() const { return counters() + rows_ + 1; }
  SPECDEC_DEVICE uint32_t* settled() const { return counters() + rows_ + 2; }
  SPECDEC_DEVICE bool is_settled() const { return load_relaxed(settled() + part().row / 32) >> part().row % 32 & 1; }

  // Whether the path passes a row by, since it goes on from this one to `next`: it is below this row, but not below
  // `next`, nor that itself.
  SPECDEC_DEVICE bool passed_by(int node, int next) const {
    if constexpr (kIsChain) return node > part().row && next < 0 && !op_.independent;
    int below = node;
    while (node > part().row) below = node, node = parent(node);
    return node == part().row && below != part().row && below != next;
  }

  // Settles this row, and those that are passed by. Whether those were the last of the request.
  SPECDEC_DEVICE bool settle(int next) const {
    int more = 0;
    SPECDEC_ROLLED
    for (int word = block::warp(); 32 * word < live(); word += kWarps) {
      const uint32_t bits = block::bits([&](int bit) {
        const int node = 32 * word + bit;
        return node < live() && (node == part().row || passed_by(node, next));
      });
      if (block::lane() == 0 && bits != 0) more += std::popcount(bits & ~atomic_or(settled() + word, bits));
    }
    more = block::reduce(more, std::plus<>());
    return block::any(block::rank() == 0 && more > 0 && int(atomic_add(rows_settled(), more)) + more == live());
  }

  // Once all blocks of a row have come. The last row of the request leaves its counters as they were found.
  SPECDEC_DEVICE void leave() const {
    if (block::rank() != kThreads - 1) return;  // not who has most to do
    if (atomic_inc(rows_done(), uint32_t(live() - 1)) != uint32_t(live() - 1)) return;
    fence_acquire(rows_done());
    store_l2(rows_settled(), 0u);
    SPECDEC_ROLLED
    for (int word = 0; word < words(); ++word) store_l2(settled() + word, 0u);
  }

  const Op& op_;
  const Verification& all_;
  const Plan& work_;
  const int rows_;
};

}  // namespace specdec::cuda
