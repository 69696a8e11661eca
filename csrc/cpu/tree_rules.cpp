// Rules for a tree of drafts (algorithms.md, 3 to 5).
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "request.h"
#include "tree.h"

namespace specdec {
namespace {

class TreeRequest : Request {
 public:
  TreeRequest(const VerifyTree& op, const Kernels& kernels, int64_t threads, int64_t b, SharedPass& pass)
      : Request(op.common, kernels, threads, b, op.rule == TreeRule::traversal ? deepest(op, b) + 1 : 1, 0,
                b * op.common.rows, pass),
        tree_(op),
        parents_(op.parents + b * op.common.rows),
        live_(live_nodes(parents_, op.common.rows)) {
    path_.reserve(size_t(live_));  // prefixes hold on to it
  }

  void run() {
    switch (tree_.rule) {
      case TreeRule::walk:
      case TreeRule::coupled: walk(); break;
      case TreeRule::recursive: recursive(); break;
      case TreeRule::traversal: traversal(); break;
    }
    int32_t* nodes = tree_.out_nodes + b_ * op_.rows;
    std::copy(accepted_.begin(), accepted_.end(), nodes);
    std::fill(nodes + accepted_.size(), nodes + op_.rows, -1);
  }

 private:
  static int64_t deepest(const VerifyTree& op, int64_t b) {
    const int64_t* parents = op.parents + b * op.common.rows;
    std::vector<int64_t> depth(size_t(live_nodes(parents, op.common.rows)), 0);
    for (size_t n = 1; n < depth.size(); ++n) depth[n] = depth[size_t(parents[n])] + 1;
    return depth.empty() ? 0 : *std::max_element(depth.begin(), depth.end());
  }

  // The first child of `node` behind `after`, -1 if there is none.
  int64_t child_of(int64_t node, int64_t after) const {
    for (int64_t n = std::max(node, after) + 1; n < live_; ++n)
      if (parents_[n] == node) return n;
    return -1;
  }

  // Whether all children of a node were drawn from a distribution that can be used; none is looked at otherwise.
  bool usable(const DraftDistribution& draft, int64_t node) const {
    for (int64_t n = child_of(node, node); n >= 0; n = child_of(node, n))
      if (!draft.usable(token_at(n))) return false;
    return true;
  }

  RowView view_of(int64_t node, int64_t place) { return view(node, place, {path_.data(), int64_t(path_.size())}); }

  void accept(const RowView& target, int64_t node, int64_t child) {
    write(target, node, token_at(child));
    path_.push_back(token_at(child));
    accepted_.push_back(int32_t(child));
  }

  // What the target draws, as far as it is among the children.
  void walk() {
    for (int64_t node = 0;;) {
      RowView target = view_of(node, 0);
      target.pass_all(pass_);
      if (!target.valid()) return finish_unusable(target, node);
      const int64_t drawn = tree_.rule == TreeRule::coupled ? coupled_draw(target, int64_t(path_.size()))
                                                            : target.draw(noise(kTarget, node));
      int64_t next = child_of(node, node);
      while (next >= 0 && token_at(next) != drawn) next = child_of(node, next);
      if (next < 0) return finish(target, node, drawn);
      accept(target, node, next);
      node = next;
    }
  }

  // Top-down: each child by what its rejected siblings left.
  void recursive() {
    for (int64_t node = 0;;) {
      int64_t child = child_of(node, node);
      const int64_t token = child >= 0 ? token_at(child) : -1;
      RowView target = view_of(node, 0);
      const DraftDistribution draft = score(target, node, token);
      if (!target.valid()) return finish_unusable(target, node);
      Residual left(kernels_, target, draft, pass_, tree_.replacement);
      if (!usable(draft, node)) {
        valid_ = false;  // the path ends here with a draw from the target
        child = -1;
      }
      while (child >= 0 && !left.accepts(token_at(child), uniform(child - 1))) {
        left.reject(token_at(child));
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

  // Weng et al., arXiv:2505.12398, bottom-up and with the path to the node in hand in place of a recursion.
  void traversal() {
    std::deque<Visit> visits;  // of things that stay where they are
    init_node(visits, 0, 1.0);
    for (;;) {
      Visit& here = visits.back();
      if (here.next >= 0) {
        const int64_t child = here.next, token = token_at(child);
        here.next = child_of(here.node, child);
        const double path_prob = here.left.path_prob_of(token);
        here.left.reject(token);  // to be read only once it is
        if (path_prob > 0.0) {    // else nothing below it can be accepted, and nothing is read
          path_.push_back(token);
          init_node(visits, child, path_prob);
        }
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
    const int64_t token = child >= 0 ? token_at(child) : -1;
    RowView target = view_of(node, int64_t(visits.size()));
    const DraftDistribution draft = score(target, node, token);
    if (!target.valid() || !usable(draft, node)) {
      valid_ = false;
      child = -1;
    }
    visits.emplace_back(node, child, target, kernels_, draft, pass_, tree_.replacement, path_prob);
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

  const VerifyTree& tree_;
  const int64_t* parents_;
  const int64_t live_;
  std::vector<int64_t> path_;  // tokens from the root on
  std::vector<int32_t> accepted_{0};
};

}  // namespace

void verify_tree(const VerifyTree& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  each_request(op.common.batch, op.common.vocab, threads, run,
               [&](int64_t b, SharedPass& pass) { TreeRequest(op, table, threads, b, pass).run(); });
}

}  // namespace specdec
