// Rules for a chain of drafts.
#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "request.h"

namespace specdec {
namespace {

int64_t first_row(const VerifyChain& op, int64_t request) { return op.cu_rows ? op.cu_rows[request] : 0; }

class ChainRequest : Request {
 public:
  ChainRequest(const VerifyChain& op, const Kernels& kernels, int64_t threads, int64_t b, SharedPass& pass)
      : Request(op.common, kernels, threads, b, op.rule == Rule::block ? op.common.rows : 1, first_row(op, b),
                op.cu_rows ? op.cu_rows[b] : b * op.common.rows, pass),
        chain_(op) {
    const int64_t room = op.room(b);
    drafts_.reserve(size_t(room));
    for (int64_t i = 0; i < room && token_at(i) >= 0; ++i) drafts_.push_back(token_at(i));
  }

  void run() {
    switch (chain_.rule) {
      case Rule::token: token_rule(); break;
      case Rule::block: block_rule(); break;
      case Rule::coupled: coupled_rule(); break;
    }
    chain_.out_counters[2 * b_] = int32_t(drafted());
    chain_.out_counters[2 * b_ + 1] = chain_.independent ? count_independent() : -1;
  }

 private:
  int64_t drafted() const { return int64_t(drafts_.size()); }
  int64_t draft_at(int64_t i) const { return i < drafted() ? drafts_[size_t(i)] : -1; }

  RowView view_of(int64_t i, int64_t place) { return view(i, place, {drafts_.data(), i}); }

  void token_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view_of(i, 0);
      const int64_t token = draft_at(i);
      const double u = token >= 0 ? uniform(i) : 0.0;
      const DraftDistribution draft = score(target, i, token);
      Residual left(kernels_, target, draft, pass_, false);
      const bool usable = target.valid() && token >= 0 && draft.usable(token);
      if (usable && left.accepts(token, u)) {
        write(target, i, token);
        continue;
      }
      if (!target.valid()) return finish_unusable(target, i);
      if (usable)
        left.reject(token);
      else
        valid_ = token < 0;  // the step ends here with a draw from the target
      return finish(target, i, left.draw(noise(kTarget, i)));
    }
  }

  // Sun et al., arXiv:2403.10444: the longest prefix that its uniform keeps. Looked at from the end, so that a
  // residual's mass is only taken of rows behind the kept prefix.
  void block_rule() {
    std::deque<RowView> targets;  // residuals hold on to them
    std::deque<Residual> left;
    double path_prob = 1.0;
    const auto visit = [&](int64_t token) {
      const auto i = int64_t(left.size());
      targets.push_back(view_of(i, i));
      const DraftDistribution draft = score(targets.back(), i, token);
      left.emplace_back(kernels_, targets.back(), draft, pass_, false, path_prob);
      return draft;
    };
    int64_t visited = 0;
    for (; visited < drafted() && path_prob > 0.0; ++visited) {  // once 0, it stays 0
      const int64_t token = drafts_[size_t(visited)];
      const DraftDistribution draft = visit(token);
      if (!targets.back().valid() || !draft.usable(token)) {
        valid_ = false;
        break;
      }
      path_prob = left.back().path_prob_of(token);
      left.back().reject(token);
    }
    int64_t accepted = visited;
    for (; accepted > 0; --accepted) {
      const double u = uniform(accepted - 1);
      if (accepted == visited ? u < path_prob : left[size_t(accepted)].reached(u)) break;
    }
    if (accepted == int64_t(left.size())) visit(-1);
    for (int64_t i = 0; i < accepted; ++i) write(targets[size_t(i)], i, drafts_[size_t(i)]);
    const RowView& target = targets[size_t(accepted)];
    if (!target.valid()) return finish_unusable(target, accepted);
    finish(target, accepted, left[size_t(accepted)].draw(noise(kTarget, accepted)));
  }

  // Daliri et al., arXiv:2408.07978: a draft is accepted iff it is what the target draws.
  void coupled_rule() {
    for (int64_t i = 0;; ++i) {
      RowView target = view_of(i, 0);
      target.pass_all(pass_);
      if (!target.valid()) return finish_unusable(target, i);
      const int64_t drawn = coupled_draw(target, i);
      if (i == drafted() || drawn != drafts_[size_t(i)]) return finish(target, i, drawn);
      write(target, i, drawn);
    }
  }

  int32_t count_independent() {
    int32_t count = 0;
    for (int64_t i = 0; i < drafted(); ++i) {
      const int64_t token = drafts_[size_t(i)];
      RowView target = view_of(i, 0);
      const DraftDistribution draft = score(target, i, token);
      if (!target.valid()) continue;
      if (chain_.rule == Rule::coupled)
        count += coupled_draw(target, i) == token;
      else
        count += draft.usable(token) && Residual(kernels_, target, draft, pass_, false).accepts(token, uniform(i));
    }
    return count;
  }

  const VerifyChain& chain_;
  std::vector<int64_t> drafts_;
};

}  // namespace

bool ids_in_range(const VerifyChain& op) {
  const Verification& all = op.common;
  for (int64_t b = 0; b < all.batch; ++b) {
    const int64_t limit = op.room(b);
    for (int64_t i = 0; i < limit; ++i) {
      const int64_t token = all.tokens[b * all.token_strides[0] + i * all.token_strides[1]];
      if (token == -1) break;
      if (token < -1 || token >= all.vocab) return false;
    }
  }
  return true;
}

void verify_chain(const VerifyChain& op, int64_t threads, RunOnThreads run) {
  const Kernels& table = *kernels();
  each_request(op.common.batch, op.common.vocab, threads, run,
               [&](int64_t b, SharedPass& pass) { ChainRequest(op, table, threads, b, pass).run(); });
}

}  // namespace specdec
