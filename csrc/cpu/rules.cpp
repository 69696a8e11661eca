// Rules for drafts (algorithms.md, 1 to 5). A chain is a tree whose nodes have one child each: rule token is recursive
// there, and block is traversal.
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "request.h"
#include "residual.h"

namespace specdec {
namespace {

// The drafts of a request: a tree, or a chain where `parents` is null. Node 0 is the root; a draft has the row of its
// node, was drawn from the row of its parent, and is tested with the uniform of the row before its own.
struct Drafts {
  const int64_t* parents;
  int64_t live;  // nodes

  // The first child of `node` behind `after`, -1 if there is none.
  int64_t child_of(int64_t node, int64_t after) const {
    if (parents == nullptr) return after == node && node + 1 < live ? node + 1 : -1;
    for (int64_t n = std::max(node, after) + 1; n < live; ++n)
      if (parents[n] == node) return n;
    return -1;
  }

  int64_t deepest() const {
    if (parents == nullptr) return live - 1;
    std::vector<int64_t> depth(size_t(live), 0);
    for (size_t n = 1; n < depth.size(); ++n) depth[n] = depth[size_t(parents[n])] + 1;
    return depth.empty() ? 0 : *std::max_element(depth.begin(), depth.end());
  }
};

class Request {
 public:
  // `first_logits`, `first_mask`: where the rows of the request begin, of the logits from its own stride on, of the
  // masks from their first.
  Request(const Verification& op, const Drafts& drafts, TreeRule rule, bool replacement, const Workers& workers,
          int64_t b, int64_t first_logits, int64_t first_mask)
      : op_(op),
        drafts_(drafts),
        rule_(rule),
        replacement_(replacement),
        workers_(workers),
        b_(b),
        first_logits_(first_logits),
        first_mask_(first_mask),
        scratch_(scratch()),
        sampling_(sampling_of(op.sampling, b)),
        draft_scale_(op.draft_stats ? 1.0f : op.draft_scale(b)),
        adjustments_(adjustments_of(op.processing, b)) {
    // Allocate every row's scratch now: a later resize would invalidate references that views keep.
    const auto held = size_t(rule == TreeRule::traversal ? drafts.deepest() + 1 : 1);
    if (scratch_.targets.size() < held) scratch_.targets.resize(held);
    path_.reserve(size_t(drafts.live));  // prefixes hold on to it
    std::fill_n(op.out_tokens + b * op.rows, op.rows, int64_t(-1));
    for (float* out : {op.out_logprobs, op.out_raw_logprobs})
      if (out != nullptr) std::fill_n(out + b * op.rows, op.rows, NAN);
  }

  // The root and the accepted nodes.
  const std::vector<int32_t>& run() {
    switch (rule_) {
      case TreeRule::walk:
      case TreeRule::coupled: walk(); break;
      case TreeRule::recursive: recursive(); break;
      case TreeRule::traversal: traversal(); break;
    }
    return accepted_;
  }

  // Drafts of a chain that would be accepted each by itself.
  int32_t count_independent() {
    int32_t count = 0;
    path_.clear();
    for (int64_t node = 0; node + 1 < drafts_.live; ++node) {
      const int64_t token = token_of(node + 1);
      RowView target = view(node, 0);
      const DraftDistribution draft = score(target, node, token);
      path_.push_back(token);
      if (!target.valid()) continue;
      if (rule_ == TreeRule::coupled)
        count += coupled_draw(target, node) == token;
      else
        count += draft.usable(token) && Residual(target, draft, false).accepts(token, uniform(node));
    }
    return count;
  }

 private:
  int64_t num_accepted() const { return int64_t(accepted_.size()) - 1; }
  bool is_chain() const { return drafts_.parents == nullptr; }
  int64_t child_of(int64_t node, int64_t after) const { return drafts_.child_of(node, after); }
  int64_t token_of(int64_t node) const { return op_.token(b_, is_chain() ? node - 1 : node); }

  Noise noise(uint32_t purpose, int64_t row) const {
    return {uint64_t(op_.seed[b_]), uint64_t(op_.position[b_]), purpose | uint32_t(row) << 16};
  }

  // A 64-bit uniform in [0, 1), cut to the 53 bits of a double so that it cannot round to 1.
  double uniform(int64_t row) const {
    uint32_t words[4];
    workers_.kernels.words(noise(kAccept, row), 0, 1, words);
    return double((uint64_t(words[0]) << 32 | words[1]) >> 11) * 0x1p-53;
  }

  // The target's row of a node, whose penalties count the path as output; its tiles kept in the given place of the
  // scratch.
  RowView view(int64_t node, int64_t place) {
    TileSpace& space = scratch_.targets[size_t(place)];
    space.resize(tiles_of(op_.vocab));
    const uint32_t* mask = mask_of(op_.processing, op_.vocab, first_mask_ + node);
    const Source source(target_row(node), mask, adjustments_, {path_.data(), int64_t(path_.size())});
    return RowView(workers_, source, sampling_, space);
  }

  // Looks at target row i, and at the distribution of its drafts if there are any, `token` the first of them, else -1;
  // both rows in one shared pass where both are needed. A greedy target accepts its argmax and emits its argmax: there
  // no distribution of the draft matters.
  DraftDistribution score(RowView& target, int64_t i, int64_t token) {
    DraftDistribution drafted;
    if (token < 0 || op_.draft.data == nullptr || is_greedy(target.scale()) || is_greedy(draft_scale_)) {
      target.pass_all();
      drafted.point_mass = true;
      return drafted;
    }
    const int64_t offset = b_ * op_.draft.request_stride + i * op_.draft.row_stride;
    drafted.row = row_at(op_.draft, op_.vocab, offset, op_.target_to_draft);
    if (op_.draft_stats == nullptr) {
      scratch_.draft.resize(tiles_of(op_.vocab));
      RowView draft(workers_, Source(drafted.row), {draft_scale_, {}}, scratch_.draft);
      RowView* const rows[] = {&target, &draft};
      const uint32_t pieces = target.pieces();
      workers_.pass.run(2 * pieces, [&](uint32_t piece) { rows[piece / pieces]->pass(piece % pieces); });
      for (RowView* row : rows) row->finish();
      drafted.dist = draft.distribution();
      drafted.valid = draft.valid();
      return drafted;
    }
    target.pass_all();
    const float* stats = op_.draft_stats + 3 * (b_ * op_.draft_rows + i);
    drafted.point_mass = is_greedy(stats[0]);
    drafted.dist = {stats[0], stats[1], stats[2], 0.0f};
    return drafted;
  }

  // What the rule coupled draws at an absolute position.
  int64_t coupled_draw(const RowView& target, int64_t ahead) const {
    return target.flat_draw({uint64_t(op_.seed[b_]), uint64_t(op_.position[b_] + ahead), kCoupled});
  }

  // The token after the accepted ones, of target row i; a row that is not usable has no log-probability.
  void write(const RowView& target, int64_t i, int64_t token) {
    const int64_t at = b_ * op_.rows + num_accepted();
    op_.out_tokens[at] = token;
    if (op_.out_logprobs == nullptr) return;
    op_.out_logprobs[at] = target.valid() ? float(target.logprob(token)) : NAN;
    scratch_.draft.resize(tiles_of(op_.vocab));
    RowView raw(workers_, Source(target_row(i)), {1.0f, {}}, scratch_.draft);
    raw.pass_all();
    op_.out_raw_logprobs[at] = raw.valid() ? float(raw.logprob(token)) : NAN;
  }

  // The last token, and what goes with it.
  void finish(const RowView& target, int64_t i, int64_t last) {
    write(target, i, last);
    op_.out_accepted[b_] = int32_t(num_accepted());
    op_.out_valid[b_] = valid_;
  }

  // The same where the target's row is not usable.
  void finish_unusable(const RowView& target, int64_t i) {
    valid_ = false;
    finish(target, i, target.largest_finite());
  }

  Row target_row(int64_t i) const {
    const int64_t offset = b_ * op_.target.request_stride + (first_logits_ + i) * op_.target.row_stride;
    return row_at(op_.target, op_.vocab, offset);
  }

  // Whether all children of a node were drawn from a distribution that can be used; none is looked at otherwise.
  bool usable(const DraftDistribution& draft, int64_t node) const {
    for (int64_t n = child_of(node, node); n >= 0; n = child_of(node, n))
      if (!draft.usable(token_of(n))) return false;
    return true;
  }

  void accept(const RowView& target, int64_t node, int64_t child) {
    write(target, node, token_of(child));
    path_.push_back(token_of(child));
    accepted_.push_back(int32_t(child));
  }

  // What the target draws, as far as it is among the children (rule coupled: Daliri et al., arXiv:2408.07978).
  void walk() {
    for (int64_t node = 0;;) {
      RowView target = view(node, 0);
      target.pass_all();
      if (!target.valid()) return finish_unusable(target, node);
      const int64_t drawn =
          rule_ == TreeRule::coupled ? coupled_draw(target, int64_t(path_.size())) : target.draw(noise(kTarget, node));
      int64_t next = child_of(node, node);
      while (next >= 0 && token_of(next) != drawn) next = child_of(node, next);
      if (next < 0) return finish(target, node, drawn);
      accept(target, node, next);
      node = next;
    }
  }

  // Top-down: each child by what its rejected siblings left.
  void recursive() {
    for (int64_t node = 0;;) {
      int64_t child = child_of(node, node);
      const int64_t token = child >= 0 ? token_of(child) : -1;
      RowView target = view(node, 0);
      const DraftDistribution draft = score(target, node, token);
      if (!target.valid()) return finish_unusable(target, node);
      Residual left(target, draft, replacement_);
      if (!usable(draft, node)) {
        valid_ = false;  // the path ends here with a draw from the target
        child = -1;
      }
      while (child >= 0 && !left.accepts(token_of(child), uniform(child - 1))) {
        left.reject(token_of(child));
        child = child_of(node, child);
      }
      if (child < 0) return finish(target, node, left.draw(noise(kTarget, node)));
      accept(target, node, child);
      node = child;
    }
  }

  // A node that is being decided on: its children one after the other, then itself.
  struct Visit {
    Visit(int64_t visited, int64_t child, const RowView& row, const DraftDistribution& draft, bool replacement,
          double path_prob)
        : node(visited), next(child), target(row), left(target, draft, replacement, path_prob) {}

    int64_t node, next;  // child to look at
    RowView target;
    Residual left;
  };

  // Sun et al., arXiv:2403.10444, and for trees Weng et al., arXiv:2505.12398: bottom-up, so that a residual's mass is
  // only taken of rows behind what is kept, and with the path to the node in hand in place of a recursion.
  void traversal() {
    std::deque<Visit> visits;  // of things that stay where they are
    init_node(visits, 0, 1.0);
    for (;;) {
      Visit& here = visits.back();
      if (here.next >= 0) {
        const int64_t child = here.next, token = token_of(child);
        here.next = child_of(here.node, child);
        const double path_prob = here.left.path_prob_of(token);
        here.left.reject(token);  // to be read only once it is
        // Nothing is read below what cannot be accepted, nor a bonus token's row unless the token is drawn.
        const bool last = is_chain() && child + 1 == drafts_.live;
        if (path_prob == 0.0 || (last && uniform(child - 1) >= path_prob)) continue;
        path_.push_back(token);
        init_node(visits, child, path_prob);
      } else if (here.node == 0 || here.left.reached(uniform(here.node - 1))) {
        return accept_visits(visits);
      } else {
        visits.pop_back();
        path_.pop_back();
      }
    }
  }

  void init_node(std::deque<Visit>& visits, int64_t node, double path_prob) {
    int64_t child = child_of(node, node);
    const int64_t token = child >= 0 ? token_of(child) : -1;
    RowView target = view(node, int64_t(visits.size()));
    const DraftDistribution draft = score(target, node, token);
    if (!target.valid() || !usable(draft, node)) {
      valid_ = false;
      child = -1;
    }
    visits.emplace_back(node, child, target, draft, replacement_, path_prob);
  }

  // The text goes on along the visited nodes.
  void accept_visits(std::deque<Visit>& visits) {
    for (size_t i = 0; i + 1 < visits.size(); ++i) {
      write(visits[i].target, visits[i].node, path_[i]);
      accepted_.push_back(int32_t(visits[i + 1].node));
    }
    Visit& last = visits.back();
    if (!last.target.valid()) return finish_unusable(last.target, last.node);
    finish(last.target, last.node, last.left.draw(noise(kTarget, last.node)));
  }

  const Verification& op_;
  const Drafts drafts_;
  const TreeRule rule_;
  const bool replacement_;
  const Workers workers_;
  const int64_t b_, first_logits_, first_mask_;
  Scratch& scratch_;
  const Sampling sampling_;
  const float draft_scale_;  // of drafts that came without stats
  const Adjustments adjustments_;
  bool valid_ = true;
  std::vector<int64_t> path_;  // tokens from the root on
  std::vector<int32_t> accepted_{0};
};

TreeRule on_trees(Rule rule) {
  switch (rule) {
    case Rule::token: return TreeRule::recursive;
    case Rule::block: return TreeRule::traversal;
    default: return TreeRule::coupled;
  }
}

}  // namespace

bool ids_in_range(const VerifyChain& op) {
  for (int64_t b = 0; b < op.common.batch; ++b)
    for (int64_t i = 0; i < op.num_drafts(b); ++i) {
      const int64_t token = op.common.token(b, i);
      if (token < -1 || token >= op.common.vocab) return false;
      if (token == -1) break;
    }
  return true;
}

void verify_chain(const VerifyChain& op, int64_t threads, RunOnThreads run) {
  each_request(op.common.batch, op.common.vocab, threads, run, [&](int64_t b, const Workers& workers) {
    const int64_t first = op.cu_rows ? op.cu_rows[b] : 0;
    Drafts drafts{nullptr, 1};
    while (drafts.live <= op.num_drafts(b) && op.common.token(b, drafts.live - 1) >= 0) ++drafts.live;
    Request request(op.common, drafts, on_trees(op.rule), false, workers, b, first,
                    op.cu_rows ? first : b * op.common.rows);
    request.run();
    op.out_counters[2 * b] = int32_t(drafts.live - 1);
    op.out_counters[2 * b + 1] = op.independent ? request.count_independent() : -1;
  });
}

void verify_tree(const VerifyTree& op, int64_t threads, RunOnThreads run) {
  const int64_t rows = op.common.rows;
  each_request(op.common.batch, op.common.vocab, threads, run, [&](int64_t b, const Workers& workers) {
    const int64_t* parents = op.parents + b * rows;
    const Drafts drafts{parents, live_nodes(parents, rows)};
    Request request(op.common, drafts, op.rule, op.replacement, workers, b, 0, b * rows);
    const std::vector<int32_t>& accepted = request.run();
    std::fill(std::copy(accepted.begin(), accepted.end(), op.out_nodes + b * rows), op.out_nodes + (b + 1) * rows, -1);
  });
}

}  // namespace specdec
