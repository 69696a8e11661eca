// Rules for drafts (algorithms.md, 1 to 5). A chain is a tree whose nodes have one child each: rule token is recursive
// there, and block is traversal.
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "request.h"

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

class RuledRequest : Request {
 public:
  RuledRequest(const Verification& op, const Drafts& drafts, TreeRule rule, bool replacement, const Kernels& kernels,
               int64_t threads, int64_t b, int64_t first_logits, int64_t first_mask, SharedPass& pass)
      : Request(op, kernels, threads, b, rule == TreeRule::traversal ? drafts.deepest() + 1 : 1, first_logits,
                first_mask, pass),
        drafts_(drafts),
        rule_(rule),
        replacement_(replacement) {
    path_.reserve(size_t(drafts.live));  // prefixes hold on to it
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
      RowView target = view_of(node, 0);
      const DraftDistribution draft = score(target, node, token);
      path_.push_back(token);
      if (!target.valid()) continue;
      if (rule_ == TreeRule::coupled)
        count += coupled_draw(target, node) == token;
      else
        count += draft.usable(token) && Residual(kernels_, target, draft, pass_, false).accepts(token, uniform(node));
    }
    return count;
  }

 private:
  bool is_chain() const { return drafts_.parents == nullptr; }
  int64_t child_of(int64_t node, int64_t after) const { return drafts_.child_of(node, after); }
  int64_t token_of(int64_t node) const { return token_at(is_chain() ? node - 1 : node); }

  // Whether all children of a node were drawn from a distribution that can be used; none is looked at otherwise.
  bool usable(const DraftDistribution& draft, int64_t node) const {
    for (int64_t n = child_of(node, node); n >= 0; n = child_of(node, n))
      if (!draft.usable(token_of(n))) return false;
    return true;
  }

  RowView view_of(int64_t node, int64_t place) { return view(node, place, {path_.data(), int64_t(path_.size())}); }

  void accept(const RowView& target, int64_t node, int64_t child) {
    write(target, node, token_of(child));
    path_.push_back(token_of(child));
    accepted_.push_back(int32_t(child));
  }

  // What the target draws, as far as it is among the children (rule coupled: Daliri et al., arXiv:2408.07978).
  void walk() {
    for (int64_t node = 0;;) {
      RowView target = view_of(node, 0);
      target.pass_all(pass_);
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
      RowView target = view_of(node, 0);
      const DraftDistribution draft = score(target, node, token);
      if (!target.valid()) return finish_unusable(target, node);
      Residual left(kernels_, target, draft, pass_, replacement_);
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
    Visit(int64_t visited, int64_t child, const RowView& row, const Kernels& kernels, const DraftDistribution& draft,
          SharedPass& pass, bool replacement, double path_prob)
        : node(visited), next(child), target(row), left(kernels, target, draft, pass, replacement, path_prob) {}

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
    RowView target = view_of(node, int64_t(visits.size()));
    const DraftDistribution draft = score(target, node, token);
    if (!target.valid() || !usable(draft, node)) {
      valid_ = false;
      child = -1;
    }
    visits.emplace_back(node, child, target, kernels_, draft, pass_, replacement_, path_prob);
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

  const Drafts drafts_;
  const TreeRule rule_;
  const bool replacement_;
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

int64_t draft_at(const VerifyChain& op, int64_t b, int64_t i) {
  return op.common.tokens[b * op.common.token_strides[0] + i * op.common.token_strides[1]];
}

}  // namespace

bool ids_in_range(const VerifyChain& op) {
  for (int64_t b = 0; b < op.common.batch; ++b) {
    const int64_t limit = op.room(b);
    for (int64_t i = 0; i < limit && draft_at(op, b, i) != -1; ++i)
      if (const int64_t token = draft_at(op, b, i); token < -1 || token >= op.common.vocab) return false;
  }
  return true;
}

void verify_chain(const VerifyChain& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  each_request(op.common.batch, op.common.vocab, threads, run, [&](int64_t b, SharedPass& pass) {
    const int64_t limit = op.room(b), first = op.cu_rows ? op.cu_rows[b] : 0;
    Drafts drafts{nullptr, 1};
    while (drafts.live <= limit && draft_at(op, b, drafts.live - 1) >= 0) ++drafts.live;
    RuledRequest request(op.common, drafts, on_trees(op.rule), false, table, threads, b, first,
                         op.cu_rows ? first : b * op.common.rows, pass);
    request.run();
    op.out_counters[2 * b] = int32_t(drafts.live - 1);
    op.out_counters[2 * b + 1] = op.independent ? request.count_independent() : -1;
  });
}

void verify_tree(const VerifyTree& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  const int64_t rows = op.common.rows;
  each_request(op.common.batch, op.common.vocab, threads, run, [&](int64_t b, SharedPass& pass) {
    const int64_t* parents = op.parents + b * rows;
    const Drafts drafts{parents, live_nodes(parents, rows)};
    RuledRequest request(op.common, drafts, op.rule, op.replacement, table, threads, b, 0, b * rows, pass);
    const std::vector<int32_t>& accepted = request.run();
    std::fill(std::copy(accepted.begin(), accepted.end(), op.out_nodes + b * rows), op.out_nodes + (b + 1) * rows, -1);
  });
}

}  // namespace specdec
